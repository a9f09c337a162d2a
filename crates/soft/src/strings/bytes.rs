//! Copies, fills and searches of guest memory by host address, with the element order that string
//! instructions have.
//!
//! Other vCPUs may change the memory at any time, so there are no references to it. Each naturally
//! aligned element is read and written in one piece: chunks are multiples of elements, and where a
//! CPU splits a chunk, at the border of two cache lines, it splits none of them.
use crate::operand::mask;
use std::arch::x86_64::{
    __m128i, _mm_and_si128, _mm_cmpeq_epi8, _mm_cmpeq_epi16, _mm_cmpeq_epi32, _mm_loadu_si128,
    _mm_movemask_epi8, _mm_set1_epi64x, _mm_shuffle_epi32, _mm_storeu_si128,
};

/// Bytes of a chunk.
const CHUNK: usize = size_of::<__m128i>();
/// Copies and fills of more bytes than this are worth a call of the C library.
const LONG: usize = 256;

/// Which way RSI and RDI go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// EFLAGS.DF is clear.
    Up,
    /// EFLAGS.DF is set.
    Down,
}

/// Elements to take: at least one, the first at the pointer that goes with it.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    pub elements: usize,
    /// 1, 2, 4 or 8.
    pub size: usize,
    pub direction: Direction,
}

/// How far a comparison came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Elements compared, among them the one that ended it.
    pub elements: u64,
    /// The last ones compared.
    pub left: u64,
    pub right: u64,
    /// The last comparison gave what was to be found.
    pub ended: bool,
}

impl Run {
    fn bytes(self) -> usize {
        self.elements * self.size
    }

    /// Bytes from the lowest element to the first one.
    fn below(self) -> usize {
        match self.direction {
            Direction::Up => 0,
            Direction::Down => (self.elements - 1) * self.size,
        }
    }
}

/// Reads one element.
///
/// # Safety
/// `at` must be valid for reads of `size` bytes.
#[inline(always)]
unsafe fn read(at: *const u8, size: usize) -> u64 {
    // SAFETY: the caller's promise.
    unsafe {
        match size {
            1 => u64::from(at.read()),
            2 => u64::from(at.cast::<u16>().read_unaligned()),
            4 => u64::from(at.cast::<u32>().read_unaligned()),
            _ => at.cast::<u64>().read_unaligned(),
        }
    }
}

/// Writes one element.
///
/// # Safety
/// `at` must be valid for writes of `size` bytes.
#[inline(always)]
unsafe fn write(at: *mut u8, value: u64, size: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match size {
            1 => at.write(value as u8),
            2 => at.cast::<u16>().write_unaligned(value as u16),
            4 => at.cast::<u32>().write_unaligned(value as u32),
            _ => at.cast::<u64>().write_unaligned(value),
        }
    }
}

/// Copies element by element, in order: where the target lies less than the whole run ahead of the
/// source, what was written is read again.
///
/// # Safety
/// Both pointers must be valid for the run.
#[inline]
pub unsafe fn copy(source: *const u8, target: *mut u8, run: Run) {
    // SAFETY: the caller's promise.
    unsafe {
        match run.direction {
            Direction::Up => copy_up(source, target, run),
            Direction::Down => copy_down(source, target, run),
        }
    }
}

/// # Safety
/// As [`copy`].
#[inline]
unsafe fn copy_up(source: *const u8, target: *mut u8, run: Run) {
    let bytes = run.bytes();
    // The distance behind the target at which a byte is written before it is read; a target below
    // its source has a huge one.
    let mut distance = (target as usize).wrapping_sub(source as usize);
    // SAFETY: the caller's promise; every step stays within `bytes`.
    unsafe {
        if distance >= CHUNK || distance == 0 {
            if bytes > LONG && (distance >= bytes || distance == 0) {
                std::ptr::copy(source, target, bytes);
            } else {
                copy_chunks(source, target, bytes);
            }
        } else if distance < run.size {
            for n in 0..run.elements {
                let at = n * run.size;
                write(target.add(at), read(source.add(at), run.size), run.size);
            }
        } else {
            // The bytes from `source` to the present target repeat with the first distance, so
            // each step can copy all of them, until they fill a chunk.
            let mut done = 0;
            while distance < CHUNK && done < bytes {
                let step = distance.min(bytes - done);
                copy_chunks(source, target.add(done), step);
                done += step;
                distance += step;
            }
            copy_chunks(source, target.add(done), bytes - done);
        }
    }
}

/// Copies upwards, 16 bytes at a time. Right for targets that lie 16 bytes or more ahead of their
/// source, at it, or anywhere behind it.
///
/// # Safety
/// Both pointers must be valid for `bytes` bytes.
#[inline]
unsafe fn copy_chunks(source: *const u8, target: *mut u8, bytes: usize) {
    // SAFETY: the caller's promise; every step stays within `bytes`.
    unsafe {
        let mut at = 0;
        while at + CHUNK <= bytes {
            let chunk = _mm_loadu_si128(source.add(at).cast());
            _mm_storeu_si128(target.add(at).cast(), chunk);
            at += CHUNK;
        }
        for size in [8, 4, 2, 1] {
            if bytes & size != 0 {
                write(target.add(at), read(source.add(at), size), size);
                at += size;
            }
        }
    }
}

/// # Safety
/// As [`copy`].
unsafe fn copy_down(source: *const u8, target: *mut u8, run: Run) {
    let (bytes, below) = (run.bytes(), run.below());
    // SAFETY: the caller's promise; the lowest element is `below` bytes before the first one.
    unsafe {
        let (low_source, low_target) = (source.sub(below), target.sub(below));
        let distance = (source as usize).wrapping_sub(target as usize);
        let propagates = distance != 0 && distance < bytes;
        if bytes > LONG && !propagates {
            std::ptr::copy(low_source, low_target, bytes);
            return;
        }
        let mut at = bytes;
        while (distance >= CHUNK || distance == 0) && at >= CHUNK {
            at -= CHUNK;
            let chunk = _mm_loadu_si128(low_source.add(at).cast());
            _mm_storeu_si128(low_target.add(at).cast(), chunk);
        }
        while at != 0 {
            at -= run.size;
            write(low_target.add(at), read(low_source.add(at), run.size), run.size);
        }
    }
}

/// Stores the low bytes of `value` in each element.
///
/// # Safety
/// `target` must be valid for the run.
#[inline]
pub unsafe fn fill(target: *mut u8, value: u64, run: Run) {
    let bytes = run.bytes();
    let pattern = repeated(value, run.size);
    // SAFETY: the caller's promise; the lowest element is `below` bytes before the first one, and
    // every step stays within `bytes`.
    unsafe {
        let target = target.sub(run.below());
        if bytes > LONG && pattern == repeated(value, 1) {
            std::ptr::write_bytes(target, value as u8, bytes);
            return;
        }
        let chunk = _mm_set1_epi64x(pattern as i64);
        let mut at = 0;
        while at + CHUNK <= bytes {
            _mm_storeu_si128(target.add(at).cast(), chunk);
            at += CHUNK;
        }
        for size in [8, 4, 2, 1] {
            if bytes & size != 0 {
                write(target.add(at), pattern, size);
                at += size;
            }
        }
    }
}

/// The low `size` bytes of `value` as often as 64 bits hold them.
fn repeated(value: u64, size: usize) -> u64 {
    // All ones over all ones of an element: a one at the start of each element.
    (value & mask(size)).wrapping_mul(match size {
        1 => 0x0101_0101_0101_0101,
        2 => 0x0001_0001_0001_0001,
        4 => 0x0000_0001_0000_0001,
        _ => 1,
    })
}

/// The last element of the run.
///
/// # Safety
/// `source` must be valid for the run.
pub unsafe fn last(source: *const u8, run: Run) -> u64 {
    let others = (run.elements - 1) * run.size;
    // SAFETY: the caller's promise.
    unsafe {
        match run.direction {
            Direction::Up => read(source.add(others), run.size),
            Direction::Down => read(source.sub(others), run.size),
        }
    }
}

/// Compares elements of two runs until a pair is equal or, if not `until_equal`, differs.
///
/// # Safety
/// Both pointers must be valid for the run, and for reads of `readable` bytes upwards.
pub unsafe fn compare(
    left: *const u8,
    right: *const u8,
    run: Run,
    readable: usize,
    until_equal: bool,
) -> Found {
    // SAFETY: the caller's promise; `search` asks for no more.
    unsafe {
        search(
            run,
            readable,
            until_equal,
            |at| {
                let chunk = |p: *const u8| _mm_loadu_si128(p.offset(at).cast());
                (chunk(left), chunk(right))
            },
            |at, size| (read(left.offset(at), size), read(right.offset(at), size)),
        )
    }
}

/// The same with the low bytes of `value` in place of the left run.
///
/// # Safety
/// As [`compare`].
pub unsafe fn scan(
    right: *const u8,
    value: u64,
    run: Run,
    readable: usize,
    until_equal: bool,
) -> Found {
    // SAFETY: the caller's promise; `search` asks for no more.
    unsafe {
        let (left, value) =
            (_mm_set1_epi64x(repeated(value, run.size) as i64), value & mask(run.size));
        search(
            run,
            readable,
            until_equal,
            |at| (left, _mm_loadu_si128(right.offset(at).cast())),
            |at, size| (value, read(right.offset(at), size)),
        )
    }
}

/// Looks for the end of a comparison. `chunks` reads 16 bytes at an offset of which all lie within
/// `readable`, `elements` one element of the run, of the given size.
#[inline(always)]
fn search(
    run: Run,
    readable: usize,
    until_equal: bool,
    chunks: impl Fn(isize) -> (__m128i, __m128i),
    elements: impl Fn(isize, usize) -> (u64, u64),
) -> Found {
    // One copy of the loop for each size: as a constant it costs no division.
    let size = |size| Run { size, ..run };
    match run.size {
        1 => search_sized(size(1), readable, until_equal, chunks, elements),
        2 => search_sized(size(2), readable, until_equal, chunks, elements),
        4 => search_sized(size(4), readable, until_equal, chunks, elements),
        _ => search_sized(size(8), readable, until_equal, chunks, elements),
    }
}

/// [`search`] for a size that is a constant where this is called.
#[inline(always)]
fn search_sized(
    run: Run,
    readable: usize,
    until_equal: bool,
    chunks: impl Fn(isize) -> (__m128i, __m128i),
    elements: impl Fn(isize, usize) -> (u64, u64),
) -> Found {
    let mut n = 0;
    if run.direction == Direction::Up {
        // A chunk may reach past the run, but not past what is readable.
        while n < run.elements && n * run.size + CHUNK <= readable {
            let (left, right) = chunks((n * run.size) as isize);
            let equal = equal_bytes(left, right, run.size);
            let hits = if until_equal { equal } else { !equal & 0xffff };
            let valid = ((run.elements - n) * run.size).min(CHUNK);
            let at = (hits.trailing_zeros() as usize).min(valid);
            let ended = at < valid;
            n += at / run.size;
            if ended || n == run.elements {
                // What decides is what was compared: memory may be another by now.
                let at = if ended { at } else { valid - run.size };
                let (left, right) = (lane(left, at, run.size), lane(right, at, run.size));
                return Found { elements: (n + usize::from(ended)) as u64, left, right, ended };
            }
        }
    }
    let mut pair = (0, 0);
    while n < run.elements {
        let at = (n * run.size) as isize;
        pair = elements(if run.direction == Direction::Up { at } else { -at }, run.size);
        n += 1;
        if (pair.0 == pair.1) == until_equal {
            return Found { elements: n as u64, left: pair.0, right: pair.1, ended: true };
        }
    }
    Found { elements: n as u64, left: pair.0, right: pair.1, ended: false }
}

/// A bit for each byte that belongs to an element equal on both sides.
#[inline(always)]
fn equal_bytes(left: __m128i, right: __m128i, size: usize) -> u32 {
    // SAFETY: every x86-64 CPU has SSE2.
    #[allow(unused_unsafe)]
    let equal = unsafe {
        match size {
            1 => _mm_cmpeq_epi8(left, right),
            2 => _mm_cmpeq_epi16(left, right),
            4 => _mm_cmpeq_epi32(left, right),
            _ => {
                let halves = _mm_cmpeq_epi32(left, right);
                // Each half and the other half of the same element.
                _mm_and_si128(halves, _mm_shuffle_epi32::<0b1011_0001>(halves))
            }
        }
    };
    // SAFETY: as above.
    #[allow(unused_unsafe)]
    unsafe {
        _mm_movemask_epi8(equal) as u32
    }
}

/// The element at byte `at` of a chunk.
#[inline(always)]
fn lane(chunk: __m128i, at: usize, size: usize) -> u64 {
    let mut bytes = [0u8; 2 * CHUNK];
    // SAFETY: the array has room for the chunk, and for an element wherever it begins in it.
    unsafe {
        _mm_storeu_si128(bytes.as_mut_ptr().cast(), chunk);
        read(bytes.as_ptr().add(at & (CHUNK - 1)), size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: isize = 400;

    /// Every short distance both ways, all sizes of elements, short and long runs.
    fn for_all(mut check: impl FnMut(isize, Run)) {
        for direction in [Direction::Up, Direction::Down] {
            for size in [1, 2, 4, 8] {
                for distance in -36..=36 {
                    for bytes in (1..=40).chain([63, 64, 65, 256, 264, 300]) {
                        let elements = bytes / size;
                        if elements != 0 {
                            check(distance, Run { elements, size, direction });
                        }
                    }
                }
            }
        }
    }

    fn offset(run: Run, n: usize) -> isize {
        let bytes = (n * run.size) as isize;
        START + if run.direction == Direction::Up { bytes } else { -bytes }
    }

    fn numbered() -> Vec<u8> {
        (0..800u32).map(|n| ((n * n) >> 3) as u8).collect()
    }

    #[test]
    fn a_copy_at_any_distance_is_that_of_one_element_after_the_other() {
        for_all(|distance, run| {
            let (mut got, mut wanted) = (numbered(), numbered());
            for n in 0..run.elements {
                let at = offset(run, n) as usize;
                let element = wanted[at..at + run.size].to_vec();
                let to = (at as isize + distance) as usize;
                wanted[to..to + run.size].copy_from_slice(&element);
            }
            let at = got.as_mut_ptr();
            // SAFETY: at most 300 bytes and a distance of 36 to either side of the middle of 800.
            unsafe { copy(at.offset(START), at.offset(START + distance), run) };
            assert_eq!(got, wanted, "{distance} {run:?}");
        });
    }

    #[test]
    fn a_fill_stores_each_element_and_nothing_beside_them() {
        for_all(|distance, run| {
            for value in [0x1122_3344_5566_7788u64.wrapping_mul(distance as u64), 0] {
                let (mut got, mut wanted) = (numbered(), numbered());
                for n in 0..run.elements {
                    let at = offset(run, n) as usize;
                    wanted[at..at + run.size].copy_from_slice(&value.to_le_bytes()[..run.size]);
                }
                // SAFETY: at most 300 bytes to either side of the middle of 800.
                unsafe { fill(got.as_mut_ptr().offset(START), value, run) };
                assert_eq!(got, wanted, "{value:x} {run:?}");
            }
        });
    }

    #[test]
    fn a_comparison_ends_at_the_first_pair_that_decides_it() {
        for_all(|distance, run| {
            let decisive = distance.unsigned_abs();
            for until_equal in [false, true] {
                let value = |n| u64::from((n == decisive) != until_equal) * 0x80;
                let mut data = vec![0x55; 800];
                for n in 0..run.elements {
                    let at = offset(run, n) as usize;
                    data[at..at + run.size].copy_from_slice(&value(n).to_le_bytes()[..run.size]);
                }
                let zeros = vec![0u8; 800];
                let elements = run.elements.min(decisive + 1);
                let ended = decisive < run.elements;
                let right = value(elements - 1);
                let wanted = Found { elements: elements as u64, left: 0, right, ended };
                // Some readable bytes beyond the run, or none.
                for beyond in [0, 9, 90] {
                    let readable = run.below().abs_diff(run.bytes()) + beyond;
                    let (l, r) = (zeros.as_ptr(), data.as_ptr());
                    // SAFETY: all within the 800 bytes.
                    let got = unsafe {
                        let (l, r) = (l.offset(START), r.offset(START));
                        [
                            compare(l, r, run, readable, until_equal),
                            scan(r, 0, run, readable, until_equal),
                        ]
                    };
                    assert_eq!(got, [wanted; 2], "{until_equal} {beyond} {run:?}");
                }
            }
        });
    }
}
