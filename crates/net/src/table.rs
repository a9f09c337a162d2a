//! A bounded table whose keys do not name a later entry by mistake.

/// Names an entry of a [`Table`]; no other entry gets the same key within 2^24 uses of its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    index: u32,
    generation: u32,
}

/// Generations are of so many bits, so that a key fits in 56.
const GENERATION_BITS: u32 = 24;

impl Key {
    /// As a number of 56 bits.
    pub fn to_bits(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    /// From [`Key::to_bits`].
    pub fn from_bits(bits: u64) -> Self {
        Self { index: bits as u32, generation: (bits >> 32) as u32 & ((1 << GENERATION_BITS) - 1) }
    }
}

/// Entries, at most so many as it was made for.
#[derive(Debug)]
pub(crate) struct Table<T> {
    slots: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
    limit: usize,
}

impl<T> Table<T> {
    pub fn new(limit: usize) -> Self {
        Self { slots: Vec::new(), free: Vec::new(), limit }
    }

    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub fn is_full(&self) -> bool {
        self.len() >= self.limit
    }

    /// Puts an entry in; `None` if the table is full.
    pub fn insert(&mut self, entry: T) -> Option<Key> {
        if let Some(index) = self.free.pop() {
            let slot = self.slots.get_mut(index as usize)?;
            slot.1 = Some(entry);
            return Some(Key { index, generation: slot.0 });
        }
        if self.slots.len() >= self.limit {
            return None;
        }
        self.slots.push((0, Some(entry)));
        Some(Key { index: self.slots.len() as u32 - 1, generation: 0 })
    }

    pub fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        match self.slots.get_mut(key.index as usize) {
            Some((generation, entry)) if *generation == key.generation => entry.as_mut(),
            _ => None,
        }
    }

    pub fn remove(&mut self, key: Key) -> Option<T> {
        let (generation, entry) = self.slots.get_mut(key.index as usize)?;
        if *generation != key.generation {
            return None;
        }
        let entry = entry.take()?;
        *generation = (*generation + 1) & ((1 << GENERATION_BITS) - 1);
        self.free.push(key.index);
        Some(entry)
    }

    pub fn iter(&self) -> impl Iterator<Item = (Key, &T)> {
        self.slots.iter().enumerate().filter_map(|(index, (generation, entry))| {
            let key = Key { index: index as u32, generation: *generation };
            Some((key, entry.as_ref()?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removed_entrys_key_does_not_name_its_successor() {
        let mut table = Table::new(2);
        let first = table.insert('a').unwrap();
        table.insert('b').unwrap();
        assert_eq!(table.insert('c'), None, "the table is full");
        assert_eq!(table.remove(first), Some('a'));
        let third = table.insert('c').unwrap();
        assert_ne!(first, third);
        assert_eq!(table.get_mut(first), None);
        assert_eq!(table.remove(first), None);
        assert_eq!(table.get_mut(Key::from_bits(third.to_bits())), Some(&mut 'c'));
        assert_eq!(table.len(), 2);
    }
}
