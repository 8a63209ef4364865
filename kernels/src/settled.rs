//! Measurements that hold for the kernels that a device ends up with.

use crate::Device;

/// What `measure` finds, once the device stays as it is.
///
/// A device may learn while it is measured that its driver refuses a format's kernels. It then goes on with other kernels, and its
/// fingerprint says so. What was measured before that does not count: everything is measured once more.
///
/// # Errors
/// Those of `measure`.
pub fn settled<T, E>(
    device: &mut dyn Device,
    mut measure: impl FnMut(&mut dyn Device) -> Result<T, E>,
) -> Result<T, E> {
    let before = device.info().fingerprint.clone();
    let measured = measure(device)?;
    if device.info().fingerprint == before { Ok(measured) } else { measure(device) }
}
