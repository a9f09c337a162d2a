//! A descriptor chain: the buffers of one request.
use device::{GuestPhysical, GuestRam};
use std::fmt;

/// A stretch of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First byte.
    pub start: GuestPhysical,
    /// Bytes, not zero.
    pub length: u32,
}

/// The buffers of a request: first those that the device reads, then those that it writes. All of
/// them lie in guest memory and together have less than 4 GiB. Give it back with
/// [`crate::Queue::push`]; a chain that is dropped stays the device's until the next reset.
pub struct Chain {
    ram: GuestRam,
    head: u16,
    segments: Vec<Segment>,
    /// How many of `segments` are readable.
    readable: usize,
}

impl Chain {
    /// A chain of segments that were checked, of which the first `readable` are readable.
    pub(crate) fn new(ram: GuestRam, head: u16, segments: Vec<Segment>, readable: usize) -> Self {
        Self { ram, head, segments, readable }
    }

    /// The number of its first descriptor, which names it towards the driver.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The guest's memory.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// What the device reads.
    pub fn readable(&self) -> &[Segment] {
        self.segments.get(..self.readable).unwrap_or_default()
    }

    /// What the device writes.
    pub fn writable(&self) -> &[Segment] {
        self.segments.get(self.readable..).unwrap_or_default()
    }

    /// A cursor at the first readable byte.
    pub fn reader(&self) -> ChainReader<'_> {
        ChainReader(Cursor::new(&self.ram, self.readable()))
    }

    /// A cursor at the first writable byte.
    pub fn writer(&self) -> ChainWriter<'_> {
        ChainWriter(Cursor::new(&self.ram, self.writable()))
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain")
            .field("head", &self.head)
            .field("readable", &self.readable())
            .field("writable", &self.writable())
            .finish()
    }
}

/// A position in a list of segments.
struct Cursor<'a> {
    ram: &'a GuestRam,
    /// Those not begun yet.
    rest: &'a [Segment],
    /// What is left of the one that was begun.
    current: Segment,
    remaining: u32,
    passed: u32,
}

impl<'a> Cursor<'a> {
    fn new(ram: &'a GuestRam, segments: &'a [Segment]) -> Self {
        let current = Segment { start: GuestPhysical(0), length: 0 };
        // Together less than 4 GiB: see `Chain`.
        let remaining = segments.iter().fold(0u32, |sum, s| sum.saturating_add(s.length));
        Self { ram, rest: segments, current, remaining, passed: 0 }
    }

    /// Moves on by `length` bytes at most, giving each contiguous stretch of them to `part`.
    /// Answers how many there were.
    fn advance(&mut self, length: usize, mut part: impl FnMut(&GuestRam, Segment, usize)) -> usize {
        let mut done = 0;
        while done < length {
            if self.current.length == 0 {
                let Some((first, rest)) = self.rest.split_first() else { break };
                (self.current, self.rest) = (*first, rest);
            }
            let left = u32::try_from(length - done).unwrap_or(u32::MAX);
            let step = self.current.length.min(left);
            part(self.ram, Segment { start: self.current.start, length: step }, done);
            // The segment lies in memory, so its end is an address.
            self.current.start.0 = self.current.start.0.wrapping_add(u64::from(step));
            self.current.length -= step;
            self.remaining = self.remaining.saturating_sub(step);
            self.passed = self.passed.saturating_add(step);
            done += step as usize;
        }
        done
    }
}

/// Reads a chain's readable buffers as one stream.
pub struct ChainReader<'a>(Cursor<'a>);

impl ChainReader<'_> {
    /// Bytes left.
    pub fn remaining(&self) -> usize {
        self.0.remaining as usize
    }

    /// Fills the front of `into` and moves on; answers how many bytes there were.
    pub fn read(&mut self, into: &mut [u8]) -> usize {
        self.0.advance(into.len(), |ram, segment, at| {
            let part = into.get_mut(at..at + segment.length as usize).unwrap_or_default();
            // Chains hold what was memory when they were taken, and memory stays.
            let _ = ram.read(segment.start, part);
        })
    }

    /// The next `N` bytes, where there are so many.
    pub fn read_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut array = [0; N];
        (self.remaining() >= N).then(|| self.read(&mut array)).map(|_| array)
    }

    /// The rest, up to `most` bytes.
    pub fn read_vec(&mut self, most: usize) -> Vec<u8> {
        let mut bytes = vec![0; self.remaining().min(most)];
        self.read(&mut bytes);
        bytes
    }

    /// Passes over bytes; answers how many there were.
    pub fn skip(&mut self, count: usize) -> usize {
        self.0.advance(count, |_, _, _| {})
    }
}

/// Writes a chain's writable buffers as one stream.
pub struct ChainWriter<'a>(Cursor<'a>);

impl ChainWriter<'_> {
    /// Bytes of room left.
    pub fn remaining(&self) -> usize {
        self.0.remaining as usize
    }

    /// Bytes passed so far: what [`crate::Queue::push`] is told.
    pub fn written(&self) -> u32 {
        self.0.passed
    }

    /// Writes the front of `from` and moves on; answers how many bytes had room.
    pub fn write(&mut self, from: &[u8]) -> usize {
        self.0.advance(from.len(), |ram, segment, at| {
            let part = from.get(at..at + segment.length as usize).unwrap_or_default();
            // As above.
            let _ = ram.write(segment.start, part);
        })
    }

    /// Passes over bytes without changing them; answers how many there were. They count as
    /// written.
    pub fn skip(&mut self, count: usize) -> usize {
        self.0.advance(count, |_, _, _| {})
    }
}
