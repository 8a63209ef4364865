//! Stops one thread of a process and no other, as a device that never answers does: its heartbeats go on.

use std::{fs, io};

use libc::{PTRACE_DETACH, PTRACE_INTERRUPT, PTRACE_SEIZE, c_uint, pid_t};

/// A request of `ptrace` about a thread, without address or data.
#[expect(unsafe_code, reason = "the standard library cannot stop a thread of another process")]
fn ptrace(request: c_uint, thread: pid_t) -> io::Result<()> {
    // SAFETY: these requests take no address and no data, and touch no memory of this process; the thread belongs to a child of ours.
    let done = unsafe { libc::ptrace(request, thread, std::ptr::null_mut::<u8>(), std::ptr::null_mut::<u8>()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Waits until the thread has stopped.
#[expect(unsafe_code, reason = "the standard library waits for processes only")]
fn wait_stopped(thread: pid_t) -> io::Result<()> {
    let mut status = 0;
    // SAFETY: the status is a number of this function's own.
    let found = unsafe { libc::waitpid(thread, &mut status, libc::__WALL) };
    if found == thread { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The thread of this name.
pub(crate) fn thread_of(process: u32, name: &str) -> io::Result<pid_t> {
    for task in fs::read_dir(format!("/proc/{process}/task"))?.flatten() {
        if fs::read_to_string(task.path().join("comm"))?.trim() == name {
            let id = task.file_name().to_string_lossy().parse();
            return id.map_err(io::Error::other);
        }
    }
    Err(io::Error::other(format!("no thread {name}")))
}

/// Stops a thread until `over` returns. To be called from a thread of its own: the system lets only the one that stopped it go on with it.
pub(crate) fn hold(thread: pid_t, over: impl FnOnce()) -> io::Result<()> {
    ptrace(PTRACE_SEIZE, thread)?;
    ptrace(PTRACE_INTERRUPT, thread)?;
    wait_stopped(thread)?;
    over();
    ptrace(PTRACE_DETACH, thread)
}
