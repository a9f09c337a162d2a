//! MSI-X: the table of messages that a function sends as its interrupts (PCI Local Bus
//! specification 3.0 §6.8.2).
use crate::state::{Reader, SaveFields};
use crate::{MsiSink, RestoreError, SavedState, Width};
use std::sync::Arc;

/// Bytes of a table entry.
const ENTRY: usize = 16;
/// Vector control: this vector is masked.
const MASKED: u32 = 1;

/// Message control, as it stands in configuration space.
pub mod control {
    /// MSI-X is on.
    pub const ENABLE: u16 = 1 << 15;
    /// All vectors are masked.
    pub const FUNCTION_MASK: u16 = 1 << 14;
    /// What a guest can write.
    pub const WRITABLE: u16 = ENABLE | FUNCTION_MASK;
}

/// Address low and high, data, vector control.
type Entry = [u32; 4];

/// The table and the pending bits of a function.
pub struct Msix {
    sink: Arc<dyn MsiSink>,
    entries: Vec<Entry>,
    pending: Vec<bool>,
    control: u16,
}

impl Msix {
    /// A table of so many vectors (1 to 2048), all masked, as after reset.
    pub fn new(vectors: u16, sink: Arc<dyn MsiSink>) -> Self {
        let count = usize::from(vectors);
        Self {
            sink,
            entries: vec![[0, 0, 0, MASKED]; count],
            pending: vec![false; count],
            control: 0,
        }
    }

    /// The number of vectors.
    pub fn vectors(&self) -> u16 {
        self.entries.len() as u16
    }

    /// The capability's body: message control, table and pending bits at offsets in BAR 0.
    pub fn capability(&self, table: u32, pending: u32) -> [u8; 10] {
        let mut body = [0; 10];
        let (size, places) = body.split_at_mut(2);
        size.copy_from_slice(&self.vectors().saturating_sub(1).to_le_bytes());
        let (first, second) = places.split_at_mut(4);
        first.copy_from_slice(&table.to_le_bytes());
        second.copy_from_slice(&pending.to_le_bytes());
        body
    }

    /// Everything as after reset.
    pub fn reset(&mut self) {
        self.entries.fill([0, 0, 0, MASKED]);
        self.pending.fill(false);
        self.control = 0;
    }

    /// Whether the guest has switched MSI-X on.
    pub fn is_enabled(&self) -> bool {
        self.control & control::ENABLE != 0
    }

    /// Takes over message control, of which the guest writes [`control`]'s bits.
    pub fn set_control(&mut self, control: u16) {
        self.control = control & control::WRITABLE;
        (0..self.entries.len()).for_each(|vector| self.send_pending(vector));
    }

    /// Sends the message of a vector, or notes it while that is masked. While MSI-X is off,
    /// nothing happens.
    pub fn signal(&mut self, vector: u16) {
        if let Some(pending) = self.pending.get_mut(usize::from(vector))
            && self.control & control::ENABLE != 0
        {
            *pending = true;
            self.send_pending(vector.into());
        }
    }

    fn send_pending(&mut self, vector: usize) {
        let open = self.control & control::WRITABLE == control::ENABLE;
        if let (Some([low, high, data, mask]), Some(pending)) =
            (self.entries.get(vector), self.pending.get_mut(vector))
            && open
            && mask & MASKED == 0
            && std::mem::take(pending)
        {
            self.sink.signal(u64::from(*high) << 32 | u64::from(*low & !3), *data);
        }
    }

    /// Reads the table: aligned dwords and qwords, which are all that a guest may use.
    pub fn read_table(&self, offset: u64, width: Width) -> u64 {
        dwords(offset, width).rev().fold(0, |value, at| {
            let entry = self.entries.get(at / 4);
            let dword = entry.and_then(|entry| entry.get(at % 4)).copied();
            value << 32 | u64::from(dword.unwrap_or(0))
        })
    }

    /// Writes the table, as [`Self::read_table`] reads it.
    pub fn write_table(&mut self, offset: u64, width: Width, value: u64) {
        for (n, at) in dwords(offset, width).enumerate() {
            let entry = self.entries.get_mut(at / 4);
            if let Some(dword) = entry.and_then(|entry| entry.get_mut(at % 4)) {
                *dword = (value >> (32 * n)) as u32;
                self.send_pending(at / 4);
            }
        }
    }

    /// Reads the pending bits, which a guest cannot write.
    pub fn read_pending(&self, offset: u64, width: Width) -> u64 {
        let first = usize::try_from(offset).unwrap_or(usize::MAX).saturating_mul(8);
        let bits = self.pending.iter().skip(first).take(8 * width.bytes());
        bits.enumerate().fold(0, |value, (n, bit)| value | u64::from(*bit) << n)
    }
}

/// The numbers of the dwords that an access touches; none where it is not one that may be made.
fn dwords(offset: u64, width: Width) -> std::ops::Range<usize> {
    let count = width.bytes() / 4;
    match usize::try_from(offset) {
        Ok(offset) if offset.is_multiple_of(4) && count > 0 => offset / 4..offset / 4 + count,
        _ => 0..0,
    }
}

impl SaveFields for Msix {
    fn save_fields(&self, prefix: &str, state: &mut SavedState) {
        let words = self.entries.iter().flatten();
        let table: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
        let pending: Vec<u8> = self.pending.iter().map(|bit| u8::from(*bit)).collect();
        state.put(&format!("{prefix}table"), &table);
        state.put(&format!("{prefix}pending"), &pending);
        state.put(&format!("{prefix}control"), &self.control);
    }

    /// The interrupts that wait are sent once the guest unmasks their vectors.
    fn restore_fields(
        &mut self,
        prefix: &str,
        reader: &mut Reader<'_>,
    ) -> Result<(), RestoreError> {
        let count = self.entries.len();
        let right = |table: &Vec<u8>| table.len() == count * ENTRY;
        let table: Vec<u8> = reader.get_if(&format!("{prefix}table"), right)?;
        let words = table.chunks(4).map(|word| word.try_into().map_or(0, u32::from_le_bytes));
        for (entry, word) in self.entries.iter_mut().flatten().zip(words) {
            *entry = word;
        }
        let right = |pending: &Vec<u8>| pending.len() == count && pending.iter().all(|b| *b < 2);
        let pending: Vec<u8> = reader.get_if(&format!("{prefix}pending"), right)?;
        self.pending = pending.iter().map(|bit| *bit == 1).collect();
        let known = control::ENABLE | control::FUNCTION_MASK;
        self.control =
            reader.get_if(&format!("{prefix}control"), |control| control & !known == 0)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::RecordingMsi;

    fn table() -> (Msix, Arc<RecordingMsi>) {
        let sink = Arc::new(RecordingMsi::default());
        let mut msix = Msix::new(3, sink.clone());
        for vector in 0..3 {
            msix.write_table(16 * vector, Width::Qword, 0xfee0_1000 + (vector << 32));
            msix.write_table(16 * vector + 8, Width::Dword, 0x40 + vector);
        }
        (msix, sink)
    }

    #[test]
    fn a_vector_sends_its_message_once_it_is_unmasked_and_msix_is_on() {
        let (mut msix, sink) = table();
        msix.signal(1);
        msix.write_table(16 + 12, Width::Dword, 0);
        assert_eq!(sink.take(), [], "off: what happens meanwhile is lost");
        msix.set_control(control::ENABLE | control::FUNCTION_MASK);
        msix.signal(1);
        msix.signal(1);
        msix.signal(2);
        assert_eq!((sink.take(), msix.read_pending(0, Width::Qword)), (vec![], 0b110));
        msix.set_control(control::ENABLE);
        assert_eq!(sink.take(), [(0x1_fee0_1000, 0x41)], "pending ones count as one");
        msix.signal(9);
        msix.write_table(32 + 12, Width::Dword, 0);
        assert_eq!(sink.take(), [(0x2_fee0_1000, 0x42)], "unmasking sends what waits");
        assert_eq!(msix.read_pending(0, Width::Dword), 0);
    }

    #[test]
    fn the_table_reads_as_it_was_written_and_ignores_accesses_that_may_not_be() {
        let (mut msix, _) = table();
        assert_eq!(msix.read_table(16, Width::Qword), 0x1_fee0_1000);
        assert_eq!(msix.read_table(20, Width::Qword), 0x41_0000_0001, "across registers");
        assert_eq!(msix.read_table(28, Width::Dword), 1, "masked");
        msix.write_table(16, Width::Byte, 0xff);
        msix.write_table(18, Width::Dword, 0xff);
        msix.write_table(48, Width::Dword, 0xff);
        msix.write_table(u64::MAX, Width::Qword, 0xff);
        assert_eq!(msix.read_table(16, Width::Dword), 0xfee0_1000);
        assert_eq!((msix.read_table(48, Width::Qword), msix.read_table(17, Width::Dword)), (0, 0));
        assert_eq!(msix.capability(0x4000, 0x5000), [2, 0, 0, 0x40, 0, 0, 0, 0x50, 0, 0]);
    }

    #[test]
    fn a_restored_table_still_owes_what_was_pending() {
        let (mut old, _) = table();
        old.set_control(control::ENABLE);
        old.signal(2);
        let mut state = SavedState::new("test", 1);
        old.save_fields("msix_", &mut state);
        let sink = Arc::new(RecordingMsi::default());
        let mut new = Msix::new(3, sink.clone());
        let mut reader = state.reader("test", 1).unwrap();
        new.restore_fields("msix_", &mut reader).unwrap();
        reader.finish().unwrap();
        new.write_table(32 + 12, Width::Dword, 0);
        assert_eq!(sink.take(), [(0x2_fee0_1000, 0x42)]);
        let mut smaller = Msix::new(2, sink);
        assert!(smaller.restore_fields("msix_", &mut state.reader("test", 1).unwrap()).is_err());
    }
}
