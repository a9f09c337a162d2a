//! Interrupt lines and message-signalled interrupts, as devices see them.
use crate::lock;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// A global system interrupt: the number of a line into the interrupt controllers
/// (ACPI 6.5 §5.2.13). ISA IRQ n is GSI n, but for IRQ 0, the PIT's, which is GSI 2 as on all PCs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gsi(pub u32);

impl fmt::Display for Gsi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GSI {}", self.0)
    }
}

/// The interrupt controllers, as seen from the lines.
pub trait InterruptSink: Send + Sync {
    /// The line changed to this level (high = asserted, whatever its electrical polarity).
    fn set_level(&self, gsi: Gsi, high: bool);
}

/// The receiver of message-signalled interrupts (Intel SDM 3A 10.11).
pub trait MsiSink: Send + Sync {
    /// A device writes `data` to `address`.
    fn signal(&self, address: u64, data: u32);
}

/// The wire of one GSI with the number of sources that hold it high.
struct Line {
    gsi: Gsi,
    sink: Arc<dyn InterruptSink>,
    high_sources: Mutex<u32>,
}

/// One source's connection to an interrupt line. Clones are the same source; sources made by
/// separate calls of [`Lines::source`] are ORed.
#[derive(Clone)]
pub struct IrqLine {
    line: Arc<Line>,
    high: Arc<AtomicBool>,
}

impl IrqLine {
    /// A line with this source only.
    pub fn new(sink: Arc<dyn InterruptSink>, gsi: Gsi) -> Self {
        Self {
            line: Arc::new(Line { gsi, sink, high_sources: Mutex::new(0) }),
            high: Arc::default(),
        }
    }

    /// The line's number.
    pub fn gsi(&self) -> Gsi {
        self.line.gsi
    }

    /// Sets this source's level. Costs one atomic operation where nothing changes.
    pub fn set(&self, high: bool) {
        if self.high.load(Ordering::Acquire) == high {
            return;
        }
        // Held across the sink's call, so that levels arrive in the order in which they changed.
        let mut sources = lock(&self.line.high_sources);
        if self.high.swap(high, Ordering::AcqRel) == high {
            return;
        }
        let before = *sources;
        *sources = if high { before.saturating_add(1) } else { before.saturating_sub(1) };
        if (before == 0) != (*sources == 0) {
            self.line.sink.set_level(self.line.gsi, high);
        }
    }

    /// Raises and lowers the source: one edge.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }

    /// This source's level.
    pub fn is_high(&self) -> bool {
        self.high.load(Ordering::Acquire)
    }
}

impl fmt::Debug for IrqLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IrqLine({}, high: {})", self.line.gsi, self.is_high())
    }
}

/// All interrupt lines of a machine: gives each device its own source on the line it asks for.
pub struct Lines {
    sink: Arc<dyn InterruptSink>,
    lines: BTreeMap<Gsi, Arc<Line>>,
}

impl Lines {
    /// Lines into the given interrupt controllers.
    pub fn new(sink: Arc<dyn InterruptSink>) -> Self {
        Self { sink, lines: BTreeMap::new() }
    }

    /// A new source on a line.
    pub fn source(&mut self, gsi: Gsi) -> IrqLine {
        let line = self.lines.entry(gsi).or_insert_with(|| {
            Arc::new(Line { gsi, sink: Arc::clone(&self.sink), high_sources: Mutex::new(0) })
        });
        IrqLine { line: Arc::clone(line), high: Arc::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::RecordingInterrupts;

    #[test]
    fn a_line_shared_by_two_sources_is_high_while_either_is() {
        let sink = Arc::new(RecordingInterrupts::default());
        let mut lines = Lines::new(sink.clone());
        let (a, b) = (lines.source(Gsi(9)), lines.source(Gsi(9)));
        a.set(true);
        b.set(true);
        a.set(false);
        assert_eq!(sink.take(), [(Gsi(9), true)]);
        b.set(false);
        assert_eq!(sink.take(), [(Gsi(9), false)]);
    }

    #[test]
    fn setting_the_same_level_again_does_not_reach_the_controller() {
        let sink = Arc::new(RecordingInterrupts::default());
        let line = IrqLine::new(sink.clone(), Gsi(4));
        line.set(false);
        line.set(true);
        line.clone().set(true);
        assert_eq!(sink.take(), [(Gsi(4), true)]);
    }
}
