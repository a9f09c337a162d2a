//! Memory for TCP data on its way to the guest, bounded for all connections together.
use crate::wire::Headers;

/// Payload of a large chunk: 44 segments of an Ethernet's usual 1460 bytes, which with all headers
/// fits an IP packet.
pub(crate) const LARGE: usize = 44 * 1460;
/// Payload of a small chunk, for what comes in little pieces.
pub(crate) const SMALL: usize = 4096 - Headers::ROOM;
/// What is received in fewer bytes goes into a small chunk.
const WORTH_LARGE: usize = SMALL / 2;
/// A chunk with less free at its end gets no more.
const WORTH_APPENDING: usize = 1024;
/// Most bytes of all chunks. Beyond it a connection gets one only while it has none.
const LIMIT: usize = 64 << 20;
/// Large chunks kept for reuse.
const SPARE: usize = 24;

/// Data from the host's side that the guest has not acknowledged, with room before it in which
/// headers are built, so that it goes to the guest without being copied once more.
#[derive(Debug)]
pub(crate) struct Chunk {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Chunk {
    fn with_payload(room: usize) -> Self {
        Self { bytes: vec![0; Headers::ROOM + room], start: Headers::ROOM, length: 0 }
    }

    /// Bytes of data.
    pub fn len(&self) -> usize {
        self.length
    }

    /// The part behind the data.
    fn free(&mut self) -> &mut [u8] {
        self.bytes.get_mut(self.start + self.length..).unwrap_or_default()
    }

    /// Drops data from the front, which was acknowledged.
    pub fn consume(&mut self, count: usize) {
        let count = count.min(self.length);
        self.start += count;
        self.length -= count;
    }

    /// Calls `send` with `headers` and, right behind them, `length` bytes of data from `offset` on.
    pub fn with_frame<R>(
        &mut self,
        offset: usize,
        length: usize,
        headers: &Headers,
        send: impl FnOnce(&[u8]) -> R,
    ) -> Option<R> {
        let data = self.start + offset;
        let begin = data.checked_sub(headers.len())?;
        // The headers stand where earlier data may, which is put back: it might be sent again.
        let mut before = [0; Headers::ROOM];
        let before = before.get_mut(..headers.len())?;
        let place = self.bytes.get_mut(begin..data)?;
        before.copy_from_slice(place);
        place.copy_from_slice(headers.as_slice());
        let result = self.bytes.get(begin..data + length).map(send);
        self.bytes.get_mut(begin..data)?.copy_from_slice(before);
        result
    }

    /// The data's bytes from an offset on.
    pub fn data(&self, offset: usize, length: usize) -> &[u8] {
        let begin = self.start + offset;
        self.bytes.get(begin..begin + length).unwrap_or_default()
    }

    fn is_large(&self) -> bool {
        self.bytes.len() > Headers::ROOM + SMALL
    }
}

/// Makes chunks and takes them back.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    spare: Vec<Chunk>,
    used: usize,
}

/// What filling came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Filled<E> {
    /// So many bytes more, not zero.
    Some(usize),
    /// The source has ended.
    End,
    /// The source failed.
    Failed(E),
    /// There is no memory before something is acknowledged.
    Starved,
}

impl Pool {
    /// Reads at most `most` bytes into the last chunk of `chunks` or a new one.
    pub fn fill<E>(
        &mut self,
        chunks: &mut std::collections::VecDeque<Chunk>,
        most: usize,
        mut read: impl FnMut(&mut [u8]) -> Result<usize, E>,
    ) -> Filled<E> {
        if let Some(last) = chunks.back_mut() {
            let free = last.free();
            if free.len() >= WORTH_APPENDING {
                let room = free.len().min(most);
                return match read(free.get_mut(..room).unwrap_or_default()) {
                    Ok(0) => Filled::End,
                    Ok(count) => {
                        last.length += count;
                        Filled::Some(count)
                    }
                    Err(error) => Filled::Failed(error),
                };
            }
        }
        let mut chunk = if self.used + LARGE <= LIMIT {
            self.spare.pop().unwrap_or_else(|| Chunk::with_payload(LARGE))
        } else if chunks.is_empty() {
            Chunk::with_payload(SMALL)
        } else {
            return Filled::Starved;
        };
        let room = chunk.free().len().min(most);
        let result = read(chunk.free().get_mut(..room).unwrap_or_default());
        let Ok(count @ 1..) = result else {
            self.keep(chunk);
            return match result {
                Ok(_) => Filled::End,
                Err(error) => Filled::Failed(error),
            };
        };
        chunk.length = count;
        if chunk.is_large() && count < WORTH_LARGE {
            let mut small = Chunk::with_payload(SMALL);
            small.length = count;
            small
                .bytes
                .get_mut(Headers::ROOM..Headers::ROOM + count)
                .unwrap_or_default()
                .copy_from_slice(chunk.data(0, count));
            self.keep(chunk);
            chunk = small;
        }
        self.used += chunk.bytes.len();
        chunks.push_back(chunk);
        Filled::Some(count)
    }

    /// Takes a chunk back that was in use.
    pub fn release(&mut self, chunk: Chunk) {
        self.used = self.used.saturating_sub(chunk.bytes.len());
        self.keep(chunk);
    }

    fn keep(&mut self, mut chunk: Chunk) {
        if chunk.is_large() && self.spare.len() < SPARE {
            chunk.start = Headers::ROOM;
            chunk.length = 0;
            self.spare.push(chunk);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    #[test]
    fn little_pieces_share_chunks_and_cost_no_more_than_they_are_worth() {
        let (mut pool, mut chunks) = (Pool::default(), VecDeque::new());
        for _ in 0..100_000 {
            let filled = pool.fill(&mut chunks, 1000, |room| {
                room[0] = 7;
                Ok::<_, ()>(1)
            });
            assert_eq!(filled, Filled::Some(1));
        }
        let data: usize = chunks.iter().map(Chunk::len).sum();
        assert_eq!(data, 100_000);
        assert!(pool.used < data * 3 / 2, "{} bytes for {data}", pool.used);
    }

    #[test]
    fn one_connection_cannot_take_all_memory_from_the_others() {
        let (mut pool, mut greedy, mut modest) =
            (Pool::default(), VecDeque::new(), VecDeque::new());
        let all = |room: &mut [u8]| Ok::<_, ()>(room.len());
        while pool.fill(&mut greedy, usize::MAX, all) != Filled::Starved {}
        assert!(pool.used <= LIMIT);
        assert_eq!(pool.fill(&mut modest, usize::MAX, all), Filled::Some(SMALL));
        assert_eq!(pool.fill(&mut modest, usize::MAX, all), Filled::Starved);
        pool.release(greedy.pop_front().unwrap());
        assert_ne!(pool.fill(&mut modest, usize::MAX, all), Filled::Starved);
    }

    #[test]
    fn headers_before_later_data_leave_earlier_data_as_it_was() {
        let (mut pool, mut chunks) = (Pool::default(), VecDeque::new());
        let filled = pool.fill(&mut chunks, usize::MAX, |room| {
            for (index, byte) in room.iter_mut().enumerate() {
                *byte = index as u8;
            }
            Ok::<_, ()>(room.len())
        });
        assert_eq!(filled, Filled::Some(LARGE));
        let mut headers = Headers::new(crate::wire::Mac([1; 6]), crate::wire::Mac([2; 6]), 3);
        headers.push(&[9; 40]);
        let chunk = &mut chunks[0];
        let sent = chunk.with_frame(1460, 1460, &headers, <[u8]>::to_vec).unwrap();
        assert_eq!(sent[..6], [1; 6]);
        assert_eq!(sent[54], (1460 % 256) as u8);
        assert!(chunk.data(0, LARGE).iter().enumerate().all(|(index, byte)| *byte == index as u8));
    }
}
