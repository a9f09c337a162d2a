//! The switch in front of IRQ 0 and IRQ 8 that the HPET's legacy replacement route throws.
use device::{IrqLine, lock};
use std::sync::{Arc, Mutex};

#[derive(Debug, Default)]
struct Levels {
    wanted: bool,
    cut: bool,
}

/// The output of the PIT or the RTC, which the HPET can cut off (IA-PC HPET 1.0a §2.3.4.2,
/// LEG_RT_CNF). Clones are the same output.
#[derive(Clone, Debug)]
pub struct LegacyOutput {
    line: IrqLine,
    levels: Arc<Mutex<Levels>>,
}

impl LegacyOutput {
    /// An output that drives `line`.
    pub fn new(line: IrqLine) -> Self {
        Self { line, levels: Arc::default() }
    }

    /// The device's level.
    pub fn set(&self, high: bool) {
        let mut levels = lock(&self.levels);
        levels.wanted = high;
        self.line.set(high && !levels.cut);
    }

    /// One edge.
    pub fn pulse(&self) {
        self.set(false);
        self.set(true);
        self.set(false);
    }

    /// Cuts the device off the line, or connects it again.
    pub fn cut(&self, cut: bool) {
        let mut levels = lock(&self.levels);
        levels.cut = cut;
        self.line.set(levels.wanted && !cut);
    }

    /// Whether the device is cut off. The device saves this with its own state, so that a
    /// restore in any order drives the line only where it was driven.
    pub fn is_cut(&self) -> bool {
        lock(&self.levels).cut
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use device::Gsi;
    use device::testing::RecordingInterrupts;

    #[test]
    fn a_cut_output_is_silent_and_shows_its_level_when_connected_again() {
        let sink = Arc::new(RecordingInterrupts::default());
        let output = LegacyOutput::new(IrqLine::new(sink.clone(), Gsi(8)));
        output.cut(true);
        output.pulse();
        output.set(true);
        assert_eq!(sink.take(), []);
        output.cut(false);
        assert_eq!(sink.take(), [(Gsi(8), true)]);
    }
}
