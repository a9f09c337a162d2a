//! The guest of `bv run hello`: a PVH kernel of a few KiB, assembled from `hello.S`.
//!
//! On COM1 it prints the CPU's mode and brand, the number of CPUs, the memory, the clock and the
//! devices that it found, and then echoes each line typed. `poweroff` or Ctrl-D switches the
//! machine off over ACPI, `reboot` resets it, `crash` triple-faults. It waits in HLT and is woken
//! by the serial port's interrupt.
#![forbid(unsafe_code)]

/// The kernel: an ELF64 file with a PVH entry point.
pub static IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/hello.elf"));

#[cfg(test)]
mod tests {
    use super::IMAGE;

    #[test]
    fn the_guest_is_a_pvh_kernel_of_a_few_kib() {
        assert!(IMAGE.len() < 8192, "{} bytes", IMAGE.len());
        let image = boot::Image::embedded("hello".into(), IMAGE);
        assert_eq!(boot::detect(&image).unwrap(), boot::KernelKind::Pvh);
    }
}
