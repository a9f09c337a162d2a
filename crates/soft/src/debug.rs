//! Stops that a debugger outside the guest asked for.
//!
//! They use what the guest's own debug registers and trap flag use (one instruction at a time in
//! step mode, watched accesses), but keep their own registers: the guest's show nothing.
use crate::cpu::Cpu;
use arch::GuestVirtual;
use engine::{DebugError, DebugPlan, DebugStop};

/// Bit of DR6: a single step (Intel SDM 3B 18.2.3).
const BS: u64 = 1 << 14;

/// A debugger's part of a vCPU.
#[derive(Default)]
pub struct Outside {
    plan: DebugPlan,
    /// The plan's breakpoints, as DR0 to DR3 and DR7.
    pub addresses: [u64; 4],
    /// Zero where there is no breakpoint.
    pub dr7: u64,
    /// Data breakpoints that the present instruction hit, as bits of DR6.
    pub hits: u64,
    /// Where execution breakpoints have stopped the vCPU; it goes on from there.
    passed: Option<u64>,
    /// A stop that the run loop has not seen yet.
    stop: Option<DebugStop>,
}

impl Outside {
    /// Whether each instruction is to be looked at.
    pub fn is_active(&self) -> bool {
        self.plan.single_step || self.dr7 != 0
    }

    /// Whether interrupts wait.
    pub fn holds_interrupts(&self) -> bool {
        self.plan.single_step
    }

    /// The stop that is due.
    pub fn take_stop(&mut self) -> Option<DebugStop> {
        self.stop.take()
    }
}

/// Which of the data breakpoints in DR0 to DR3 and DR7 an access hits, as bits of DR6
/// (Intel SDM 3B 18.2.5).
pub fn data_hits(addresses: &[u64], dr7: u64, at: u64, size: usize, write: bool) -> u64 {
    let mut hits = 0;
    for (n, &start) in addresses.iter().take(4).enumerate() {
        let kind = dr7 >> (16 + 4 * n) & 3;
        let enabled = dr7 >> (2 * n) & 3 != 0;
        let matches = kind == 3 || (kind == 1 && write);
        let length = [1, 2, 8, 4][(dr7 >> (18 + 4 * n) & 3) as usize];
        let start = start & !(length - 1);
        let overlap = at < start.saturating_add(length) && start < at.saturating_add(size as u64);
        if enabled && matches && overlap {
            hits |= 1 << n;
        }
    }
    hits
}

impl Cpu {
    /// Takes over a debugger's plan.
    ///
    /// # Errors
    /// No CPU could follow it.
    pub fn set_debug_plan(&mut self, plan: &DebugPlan) -> Result<(), DebugError> {
        let (addresses, dr7) = plan.registers()?;
        let passed = self.outside.passed;
        self.outside = Outside { plan: *plan, addresses, dr7, passed, ..Outside::default() };
        // Accesses that are to be watched must miss.
        self.flush_tlb();
        self.update_mode();
        Ok(())
    }

    /// Before an instruction: whether an execution breakpoint stops the vCPU here.
    pub fn stops_here(&mut self) -> bool {
        self.outside.hits = 0;
        let hits = self.outside_hits();
        if hits == 0 || self.outside.passed.take() == Some(self.rip) {
            return false;
        }
        self.outside.passed = Some(self.rip);
        self.outside.stop = Some(DebugStop::from_dr6(hits));
        true
    }

    /// After an instruction, or the delivery of its fault: whether the vCPU stops here.
    pub fn stops_after(&mut self) {
        self.outside.passed = None;
        let mut hits = std::mem::take(&mut self.outside.hits);
        if self.outside.plan.single_step {
            hits |= BS;
        }
        if hits == 0 {
            return;
        }
        // What would stop it before the next instruction is told now, and not once more.
        let next = self.outside_hits();
        self.outside.passed = (next != 0).then_some(self.rip);
        self.outside.stop = Some(DebugStop::from_dr6(hits | next));
    }

    fn outside_hits(&self) -> u64 {
        if self.outside.dr7 == 0 {
            return 0;
        }
        let address = self.code_address(self.rip);
        address.map_or(0, |address| self.outside.plan.execution_hits(GuestVirtual(address)))
    }
}
