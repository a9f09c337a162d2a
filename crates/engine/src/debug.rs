//! Debugging a guest from outside, without its knowledge.
use crate::{EngineError, Width};
use arch::GuestVirtual;

/// The power to stop a vCPU at single instructions.
pub trait Debugger {
    /// Says where [`crate::Vcpu::run`] shall return [`crate::Halt::Debug`] from now on; the
    /// default plan says nowhere.
    ///
    /// # Errors
    /// [`EngineError::Debug`] where no CPU can do that; fails too, and names it, where the host
    /// lacks something.
    fn set_plan(&mut self, plan: &DebugPlan) -> Result<(), EngineError>;
}

/// Where a vCPU shall stop. The guest sees none of it: neither in its debug registers nor in
/// flags that it pushes (but for PUSHF and the like on engines that step by the CPU's own trap
/// flag). While a plan has breakpoints, the guest's own may not hit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DebugPlan {
    /// Stop after each instruction. Interrupts and NMIs wait while this is set. Where the
    /// instruction faults, the stop is in the handler, or, where the CPU's own trap flag steps,
    /// after it.
    pub single_step: bool,
    /// Stop at these.
    pub breakpoints: [Option<Breakpoint>; 4],
}

/// One place to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Breakpoint {
    /// The linear address: of an instruction's first byte, or of data, aligned to their width.
    pub address: GuestVirtual,
    /// What happens there.
    pub kind: BreakpointKind,
}

/// What hits a breakpoint (Intel SDM 3B 18.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakpointKind {
    /// An instruction is about to execute: the stop is before it. The next run begins with it,
    /// and does not stop there again.
    Execute,
    /// An instruction has written here. Engines that interpret instructions on hosts without
    /// virtualisation may miss these and the next.
    Write(Width),
    /// An instruction has read or written here.
    Access(Width),
}

/// Why a vCPU stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DebugStop {
    /// An instruction was executed, as [`DebugPlan::single_step`] asks for.
    pub step: bool,
    /// Those of [`DebugPlan::breakpoints`] that were hit.
    pub breakpoints: [bool; 4],
}

/// A plan that no CPU can follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DebugError {
    /// Data breakpoints lie at multiples of their width.
    #[error("a breakpoint on {width} bytes at {address} is not aligned to them")]
    Misaligned {
        /// Where.
        address: GuestVirtual,
        /// How wide.
        width: u64,
    },
}

impl DebugStop {
    /// From the bits of DR6 (Intel SDM 3B 18.2.3): B0 to B3, and BS.
    pub fn from_dr6(dr6: u64) -> Self {
        let hit = |n: u32| dr6 >> n & 1 != 0;
        Self { step: hit(14), breakpoints: [hit(0), hit(1), hit(2), hit(3)] }
    }

    /// Whether anything at all was hit.
    pub fn is_any(self) -> bool {
        self.step || self.breakpoints != [false; 4]
    }
}

impl DebugPlan {
    /// The breakpoints as DR0 to DR3 and DR7 hold them (Intel SDM 3B 18.2).
    ///
    /// # Errors
    /// One is misaligned.
    pub fn registers(&self) -> Result<([u64; 4], u64), DebugError> {
        let mut addresses = [0; 4];
        let mut dr7 = 0;
        for (n, (slot, breakpoint)) in addresses.iter_mut().zip(self.breakpoints).enumerate() {
            let Some(Breakpoint { address, kind }) = breakpoint else { continue };
            let (condition, width) = match kind {
                BreakpointKind::Execute => (0b00, Width::Byte),
                BreakpointKind::Write(width) => (0b01, width),
                BreakpointKind::Access(width) => (0b11, width),
            };
            if !address.0.is_multiple_of(width.bytes()) {
                return Err(DebugError::Misaligned { address, width: width.bytes() });
            }
            let length = match width {
                Width::Byte => 0b00,
                Width::Word => 0b01,
                Width::Quad => 0b10,
                Width::Double => 0b11u64,
            };
            *slot = address.0;
            dr7 |= 0b10 << (2 * n) | (length << 2 | condition) << (16 + 4 * n);
        }
        Ok((addresses, dr7))
    }

    /// The execution breakpoints at a linear address, as bits of DR6.
    pub fn execution_hits(&self, address: GuestVirtual) -> u64 {
        let here = |b: &Option<Breakpoint>| {
            b.is_some_and(|b| b.kind == BreakpointKind::Execute && b.address == address)
        };
        (0..).zip(&self.breakpoints).filter(|(_, b)| here(b)).fold(0, |bits, (n, _)| bits | 1 << n)
    }

    /// Whether the plan asks for nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn breakpoint(address: u64, kind: BreakpointKind) -> Option<Breakpoint> {
        Some(Breakpoint { address: GuestVirtual(address), kind })
    }

    #[test]
    fn a_plan_is_told_in_the_terms_of_debug_registers() {
        let plan = DebugPlan {
            single_step: false,
            breakpoints: [
                breakpoint(0x1001, BreakpointKind::Execute),
                breakpoint(0x2000, BreakpointKind::Write(Width::Quad)),
                None,
                breakpoint(0x3004, BreakpointKind::Access(Width::Double)),
            ],
        };
        let dr7 = 0b10 | 0b10 << 2 | 0b10 << 6 | 0b1001 << 20 | 0b1111 << 28;
        assert_eq!(plan.registers(), Ok(([0x1001, 0x2000, 0, 0x3004], dr7)));
        assert_eq!(plan.execution_hits(GuestVirtual(0x1001)), 1);
        assert_eq!(plan.execution_hits(GuestVirtual(0x2000)), 0);
    }

    #[test]
    fn data_breakpoints_must_be_aligned() {
        let breakpoints =
            [breakpoint(0x1002, BreakpointKind::Write(Width::Double)), None, None, None];
        let plan = DebugPlan { single_step: false, breakpoints };
        let error = plan.registers().map_err(|e| e.to_string());
        assert_eq!(
            error,
            Err("a breakpoint on 4 bytes at 0x1002 is not aligned to them".to_owned())
        );
    }
}
