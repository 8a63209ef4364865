//! Workers of a simulated cluster with something wrong: steps that fail, layers that cannot be read, a device that hangs, a link that
//! damages, loses or delays bytes. A fault is planned before it strikes, and says whether it did.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    task::{Context, Poll},
    time::Duration,
};

use grokpipe_kernels::{Batch, DeviceInfo, KernelError, Stage, StepInput, StepOutput};
use grokpipe_model::{ModelConfig, ModelError};
use grokpipe_proto::transport::{BoxFuture, BoxIo, Listening, Net};
use grokpipe_worker::{
    executor::{Executor, InlineExecutor, Work},
    loader::{DeviceFacts, LoadRequest, StageLoader},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};
use tokio_stream::StreamExt;

/// How often something that waits looks whether its fault is over.
const LOOK: Duration = Duration::from_millis(20);

/// Which steps a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Steps of several rows.
    Prefill,
    /// Steps of one row.
    Decode,
}

impl Phase {
    fn is_of(self, rows: usize) -> bool {
        (rows > 1) == (self == Self::Prefill)
    }
}

/// How a step fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepFault {
    /// Numbers that are not finite.
    Compute,
    /// Weights that cannot be read.
    Read,
    /// The device is gone with everything on it.
    DeviceLost,
    /// A fault of the program.
    Panic,
}

/// How a link fails that brings a worker its frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireFault {
    /// A byte of hidden states is changed, in so many frames of this phase.
    Damage(Phase, u32),
    /// A byte is changed, whichever it is: the one so far behind the next.
    DamageAnywhere(usize),
    /// All connections break off.
    Reset,
    /// Nothing comes through until [`Faults::mend`].
    Silent,
    /// Nothing comes through for this long.
    Delay(Duration),
}

#[derive(Debug, Default)]
struct State {
    step: Option<(Phase, StepFault)>,
    loads: u32,
    hung: bool,
    wire: Option<WireFault>,
    /// Connections of before this count are to break off.
    resets: u64,
    struck: u32,
}

/// What is wrong with one worker; clones are of the same one.
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Mutex<State>>);

impl Faults {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next step of this phase fails.
    pub fn fail_step(&self, phase: Phase, fault: StepFault) {
        self.state().step = Some((phase, fault));
    }

    /// So many loads from now on cannot read their layers.
    pub fn fail_loads(&self, count: u32) {
        self.state().loads = count;
    }

    /// The device computes nothing until [`Faults::mend`].
    pub fn hang(&self) {
        self.state().hung = true;
    }

    /// Frames to this worker meet this fault.
    pub fn fail_wire(&self, fault: WireFault) {
        let mut state = self.state();
        if fault == WireFault::Reset {
            state.resets += 1;
            state.struck += 1;
        } else {
            state.wire = Some(fault);
        }
    }

    /// Nothing is wrong any more.
    pub fn mend(&self) {
        let mut state = self.state();
        *state = State { resets: state.resets, struck: state.struck, ..State::default() };
    }

    /// How many times a fault has struck.
    pub fn struck(&self) -> u32 {
        self.state().struck
    }

    fn hangs(&self) -> bool {
        let mut state = self.state();
        state.struck += u32::from(state.hung);
        state.hung
    }

    /// How the next step of so many rows fails.
    fn of_step(&self, rows: usize) -> Option<StepFault> {
        let mut state = self.state();
        let (_, fault) = state.step.take_if(|(phase, _)| phase.is_of(rows))?;
        state.struck += 1;
        Some(fault)
    }

    /// Changes what came over a link, or has it wait.
    fn of_bytes(&self, bytes: &mut [u8]) -> Option<Duration> {
        let mut state = self.state();
        let struck = match state.wire {
            Some(WireFault::Damage(phase, left)) => {
                let found = hidden_states(bytes, phase);
                if let Some(at) = found {
                    bytes[at] ^= 4;
                    state.wire = (left > 1).then_some(WireFault::Damage(phase, left - 1));
                }
                found.is_some()
            }
            Some(WireFault::DamageAnywhere(distance)) => {
                state.wire = match bytes.get_mut(distance) {
                    Some(byte) => {
                        *byte ^= 4;
                        None
                    }
                    None => Some(WireFault::DamageAnywhere(distance - bytes.len())),
                };
                state.wire.is_none()
            }
            Some(WireFault::Delay(time)) => {
                state.wire = None;
                state.struck += 1;
                return Some(time);
            }
            Some(WireFault::Silent | WireFault::Reset) | None => false,
        };
        state.struck += u32::from(struck);
        None
    }

    fn is_silent(&self) -> bool {
        let mut state = self.state();
        let silent = state.wire == Some(WireFault::Silent);
        state.struck += u32::from(silent);
        silent
    }
}

/// Where the hidden states of a frame of this phase lie among these bytes: field 5 of a frame, `data` in it is field 1.
fn hidden_states(bytes: &[u8], phase: Phase) -> Option<usize> {
    let varint = |at: usize| {
        let mut value = 0;
        for (count, byte) in bytes.get(at..)?.iter().take(4).enumerate() {
            value |= usize::from(byte & 0x7f) << (7 * count);
            if byte & 0x80 == 0 {
                return Some((value, at + count + 1));
            }
        }
        None
    };
    (0..bytes.len()).filter(|&at| bytes[at] == 5 << 3 | 2).find_map(|at| {
        let (message, data) = varint(at + 1)?;
        if bytes.get(data) != Some(&(1 << 3 | 2)) {
            return None;
        }
        let (length, begin) = varint(data + 1)?;
        let row = 4 * super::simulated::small_config(1).hidden_size;
        let is_it = length > 0
            && length % row == 0
            && (length + 4..length + 24).contains(&message)
            && begin + 17 < bytes.len()
            && phase.is_of(length / row);
        is_it.then_some(begin + 17)
    })
}

/// A loader whose stages have these faults.
pub struct FaultyLoader<L> {
    inner: L,
    faults: Faults,
}

impl<L> FaultyLoader<L> {
    /// Wraps a loader.
    pub fn new(inner: L, faults: Faults) -> Self {
        Self { inner, faults }
    }
}

/// What reading from a failing disk gives.
fn read_error() -> KernelError {
    KernelError::Model(ModelError::Io {
        path: "tensor00000_000".into(),
        source: io::Error::other("Input/output error"),
    })
}

impl<L: StageLoader> StageLoader for FaultyLoader<L> {
    fn device(&self) -> &DeviceFacts {
        self.inner.device()
    }
    fn config(&self) -> &ModelConfig {
        self.inner.config()
    }
    fn model_digest(&self) -> &str {
        self.inner.model_digest()
    }
    fn load(
        &mut self,
        request: &LoadRequest,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Box<dyn Stage>, KernelError> {
        {
            let mut state = self.faults.state();
            if state.loads > 0 {
                state.loads -= 1;
                state.struck += 1;
                return Err(read_error());
            }
        }
        let inner = self.inner.load(request, progress)?;
        Ok(Box::new(FaultyStage { inner, faults: self.faults.clone() }))
    }
}

struct FaultyStage {
    inner: Box<dyn Stage>,
    faults: Faults,
}

impl Stage for FaultyStage {
    fn run(&mut self, batch: &Batch, input: StepInput<'_>, wanted: &[u32]) -> Result<StepOutput, KernelError> {
        match self.faults.of_step(batch.rows.len()) {
            None => self.inner.run(batch, input, wanted),
            Some(StepFault::Compute) => Err(KernelError::NotFinite { what: "the hidden states", row: 0 }),
            Some(StepFault::Read) => Err(read_error()),
            Some(StepFault::DeviceLost) => {
                Err(KernelError::DeviceLost { device: "simulated".into(), reason: "on purpose".into() })
            }
            Some(StepFault::Panic) => panic!("on purpose"),
        }
    }
    fn device(&self) -> &DeviceInfo {
        self.inner.device()
    }
    fn weights_bytes(&self) -> u64 {
        self.inner.weights_bytes()
    }
    fn kv_bytes(&self) -> u64 {
        self.inner.kv_bytes()
    }
    fn measure_read_bandwidth(&mut self, most_bytes: u64) -> Result<f64, KernelError> {
        self.inner.measure_read_bandwidth(most_bytes)
    }
}

/// Runs work in order while nothing hangs.
#[derive(Debug)]
pub struct FaultyExecutor {
    queue: SyncSender<Work>,
    waiting: Arc<Mutex<Receiver<Work>>>,
    faults: Faults,
}

impl FaultyExecutor {
    /// An executor with these faults.
    pub fn new(faults: Faults) -> Self {
        let (queue, waiting) = sync_channel(64);
        Self { queue, waiting: Arc::new(Mutex::new(waiting)), faults }
    }
}

/// Runs what waits.
fn run_waiting(waiting: &Mutex<Receiver<Work>>) {
    let waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
    for work in waiting.try_iter() {
        InlineExecutor.execute(work);
    }
}

impl Executor for FaultyExecutor {
    fn execute(&self, work: Work) {
        // Full only when a device has hung with all that a worker may ask of it: that work is lost, as with a device that is gone.
        let _ = self.queue.try_send(work);
        if !self.faults.hangs() {
            return run_waiting(&self.waiting);
        }
        let (waiting, faults) = (Arc::clone(&self.waiting), self.faults.clone());
        // Ends when the fault is mended, or with its simulation.
        tokio::spawn(async move {
            while faults.hangs() {
                sleep(LOOK).await;
            }
            run_waiting(&waiting);
        });
    }
}

/// Connections to a worker's port have these faults.
pub struct FaultyNet<N> {
    inner: N,
    faults: Faults,
}

impl<N> FaultyNet<N> {
    /// Wraps a network.
    pub fn new(inner: N, faults: Faults) -> Self {
        Self { inner, faults }
    }
}

impl<N: Net> Net for FaultyNet<N> {
    fn connect(&self, address: String) -> BoxFuture<io::Result<BoxIo>> {
        self.inner.connect(address)
    }

    fn bind(&self, address: String) -> BoxFuture<io::Result<Listening>> {
        let (bound, faults) = (self.inner.bind(address), self.faults.clone());
        Box::pin(async move {
            let Listening { address, incoming } = bound.await?;
            let incoming = incoming.map(move |accepted| {
                let since = faults.state().resets;
                accepted.map(|(inner, peer)| {
                    (BoxIo::new(FaultyIo { inner, faults: faults.clone(), since, look: None, held: None }), peer)
                })
            });
            Ok(Listening { address, incoming: Box::pin(incoming) })
        })
    }
}

struct FaultyIo {
    inner: BoxIo,
    faults: Faults,
    /// Resets when it was made.
    since: u64,
    /// When it looks at its faults again.
    look: Option<Pin<Box<Sleep>>>,
    /// What came and is held back, and until when.
    held: Option<(Vec<u8>, Pin<Box<Sleep>>)>,
}

impl FaultyIo {
    /// Wakes the task by and by.
    fn look_again(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let look = self.look.get_or_insert_with(|| Box::pin(sleep(LOOK)));
        if look.as_mut().poll(cx).is_ready() {
            self.look = None;
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }
}

impl AsyncRead for FaultyIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.faults.state().resets > self.since {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if self.faults.is_silent() {
            return self.look_again(cx);
        }
        if let Some((bytes, until)) = &mut self.held {
            if until.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            let count = bytes.len().min(buf.remaining());
            buf.put_slice(&bytes.drain(..count).collect::<Vec<_>>());
            self.held.take_if(|(bytes, _)| bytes.is_empty());
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        match Pin::new(&mut self.inner).poll_read(cx, buf) {
            Poll::Pending => self.look_again(cx),
            Poll::Ready(Ok(())) => {
                if let Some(time) = self.faults.of_bytes(&mut buf.filled_mut()[before..]) {
                    self.held = Some((buf.filled()[before..].to_vec(), Box::pin(sleep(time))));
                    buf.set_filled(before);
                    return self.poll_read(cx, buf);
                }
                Poll::Ready(Ok(()))
            }
            failed => failed,
        }
    }
}

impl AsyncWrite for FaultyIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
