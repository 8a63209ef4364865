//! A relay in front of a port: everything between two processes goes through it, so that it can cut, silence, delay and damage.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    time::{sleep, timeout},
};

/// A worker's frames are longer, what answers them and what people say in between is shorter.
const A_FRAME: usize = 200;
/// How far from the end of what is read a byte is changed: within the hidden states.
const NEAR_THE_END: usize = 100;

#[derive(Debug, Default)]
struct State {
    silent: watch::Sender<bool>,
    /// Milliseconds that everything is late.
    late: AtomicU64,
    /// Frames that are still to be damaged.
    damage: AtomicU32,
    /// Counts cuts; connections of before end.
    cuts: watch::Sender<u64>,
}

/// A port that leads to another.
#[derive(Clone, Debug)]
pub(crate) struct Relay(Arc<State>);

impl Relay {
    /// Opens `from`; whoever connects is led to `to`. Lives as long as the process.
    pub(crate) async fn open(from: String, to: String) -> std::io::Result<Self> {
        let listener = TcpListener::bind(from).await?;
        let relay = Self(Arc::default());
        let state = Arc::clone(&relay.0);
        tokio::spawn(async move {
            while let Ok((near, _peer)) = listener.accept().await {
                tokio::spawn(lead(near, to.clone(), Arc::clone(&state)));
            }
        });
        Ok(relay)
    }

    /// All connections end.
    pub(crate) fn cut(&self) {
        self.0.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Nothing comes through, or it does again.
    pub(crate) fn silence(&self, silent: bool) {
        self.0.silent.send_replace(silent);
    }

    /// Everything is late by this much.
    pub(crate) fn delay(&self, by: Duration) {
        self.0.late.store(by.as_millis() as u64, Ordering::Relaxed);
    }

    /// The next frames are damaged, so many.
    pub(crate) fn damage(&self, frames: u32) {
        self.0.damage.store(frames, Ordering::Relaxed);
    }
}

async fn lead(near: TcpStream, to: String, state: Arc<State>) {
    let mut cuts = state.cuts.subscribe();
    // Nobody there: the other side notices that its connection ends.
    let Ok(Ok(far)) = timeout(Duration::from_secs(2), TcpStream::connect(to)).await else { return };
    let _ = (near.set_nodelay(true), far.set_nodelay(true));
    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
    tokio::select! {
        // When one side is done, the other is told by the end of the connection.
        _done = pump(near_in, far_out, &state, true) => {}
        _done = pump(far_in, near_out, &state, false) => {}
        _cut = cuts.changed() => {}
    }
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, state: &State, inwards: bool) -> std::io::Result<()> {
    let mut silent = state.silent.subscribe();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return to.shutdown().await;
        }
        // Its sender lives as long as the relay.
        let _ = silent.wait_for(|silent| !silent).await;
        let late = state.late.load(Ordering::Relaxed);
        if late > 0 {
            sleep(Duration::from_millis(late)).await;
        }
        let damaged = |left: u32| left.checked_sub(1);
        if inwards
            && count > A_FRAME
            && state.damage.fetch_update(Ordering::Relaxed, Ordering::Relaxed, damaged).is_ok()
        {
            buffer[count - NEAR_THE_END] ^= 4;
        }
        to.write_all(&buffer[..count]).await?;
    }
}
