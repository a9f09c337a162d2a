//! The tables that every test guest needs, written straight into its memory: descriptors, gates,
//! task state and page tables (Intel SDM 3A 3.4.5, 4.2–4.5, 6.11, 7.2).
use engine::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

/// Writes bytes into guest memory.
pub fn write(memory: &GuestMemory, address: u64, bytes: &[u8]) {
    memory.write_slice(bytes, GuestAddress(address)).expect("the address lies in the guest's RAM");
}
/// Writes a 64-bit word into guest memory.
pub fn write_u64(memory: &GuestMemory, address: u64, value: u64) {
    write(memory, address, &value.to_le_bytes());
}
/// Reads bytes from guest memory.
pub fn read(memory: &GuestMemory, address: u64, bytes: &mut [u8]) {
    memory.read_slice(bytes, GuestAddress(address)).expect("the address lies in the guest's RAM");
}
/// Reads a 64-bit word from guest memory.
pub fn read_u64(memory: &GuestMemory, address: u64) -> u64 {
    let mut bytes = [0; 8];
    read(memory, address, &mut bytes);
    u64::from_le_bytes(bytes)
}
/// Reads a 32-bit word from guest memory.
pub fn read_u32(memory: &GuestMemory, address: u64) -> u32 {
    let mut bytes = [0; 4];
    read(memory, address, &mut bytes);
    u32::from_le_bytes(bytes)
}

/// A code or data descriptor; `attributes` as in [`arch::Segment`], `limit` in the granularity
/// that the attributes name.
pub const fn descriptor(base: u32, limit: u32, attributes: u16) -> u64 {
    let (base, limit) = (base as u64, limit as u64);
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | (attributes as u64 & 0xff) << 40
        | (limit >> 16 & 0xf) << 48
        | (attributes as u64 >> 12 & 0xf) << 52
        | (base >> 24) << 56
}

/// A 64-bit interrupt (type 14) or trap (type 15) gate.
pub const fn gate64(selector: u16, offset: u64, kind: u8, dpl: u8, ist: u8) -> [u64; 2] {
    let low = (offset & 0xffff)
        | (selector as u64) << 16
        | (ist as u64) << 32
        | ((0x80 | dpl << 5 | kind) as u64) << 40
        | (offset >> 16 & 0xffff) << 48;
    [low, offset >> 32]
}

/// A 16- or 32-bit call, interrupt, trap or task gate.
pub const fn gate32(selector: u16, offset: u32, kind: u8, dpl: u8, count: u8) -> u64 {
    (offset as u64 & 0xffff)
        | (selector as u64) << 16
        | (count as u64) << 32
        | ((0x80 | dpl << 5 | kind) as u64) << 40
        | (offset as u64 >> 16) << 48
}

/// Bits of page-table entries.
pub mod page {
    #![allow(missing_docs)] // The names are the manual's own.
    pub const P: u64 = 1 << 0;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    pub const LARGE: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    pub const NX: u64 = 1 << 63;
}

/// A way to lay out page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paging {
    /// Two levels of 32-bit entries.
    Bits32,
    /// Three levels, PAE.
    Pae,
    /// Four levels.
    Four,
    /// Five levels, LA57.
    Five,
}

impl Paging {
    fn top(self) -> u32 {
        match self {
            Self::Bits32 => 2,
            Self::Pae => 3,
            Self::Four => 4,
            Self::Five => 5,
        }
    }
    fn bits(self) -> u32 {
        if self == Self::Bits32 { 10 } else { 9 }
    }
    fn entry_size(self) -> u64 {
        if self == Self::Bits32 { 4 } else { 8 }
    }
}

/// Page tables under construction.
#[derive(Clone, Debug)]
pub struct PageTables {
    paging: Paging,
    root: u64,
    next: u64,
}

impl PageTables {
    /// Empty tables; pages for them are taken from `root` upwards.
    pub fn new(paging: Paging, root: u64) -> Self {
        Self { paging, root, next: root + 0x1000 }
    }
    /// What CR3 holds.
    pub fn root(&self) -> u64 {
        self.root
    }

    fn read(&self, memory: &GuestMemory, at: u64) -> u64 {
        if self.paging == Paging::Bits32 {
            u64::from(read_u32(memory, at))
        } else {
            read_u64(memory, at)
        }
    }
    fn write(&self, memory: &GuestMemory, at: u64, value: u64) {
        if self.paging == Paging::Bits32 {
            write(memory, at, &(value as u32).to_le_bytes());
        } else {
            write_u64(memory, at, value);
        }
    }

    /// The guest-physical address of the entry that maps `linear` at a level (1 maps 4 KiB pages),
    /// with the tables above made where they lack.
    pub fn entry(&mut self, memory: &GuestMemory, linear: u64, level: u32) -> u64 {
        let mut table = self.root;
        let mut at = self.paging.top();
        loop {
            let shift = 12 + self.paging.bits() * (at - 1);
            let index = linear >> shift & ((1 << self.paging.bits()) - 1);
            let entry = table + index * self.paging.entry_size();
            if at == level {
                return entry;
            }
            let mut value = self.read(memory, entry);
            if value & page::P == 0 {
                // The four PAE root entries have no W and U.
                let root_of_pae = self.paging == Paging::Pae && at == 3;
                let bits = if root_of_pae { page::P } else { page::P | page::W | page::U };
                value = self.next | bits;
                self.next += 0x1000;
                self.write(memory, entry, value);
            }
            table = value & 0x000f_ffff_ffff_f000;
            at -= 1;
        }
    }

    /// Maps one 4 KiB page.
    pub fn map(&mut self, memory: &GuestMemory, linear: u64, physical: u64, bits: u64) {
        let entry = self.entry(memory, linear, 1);
        self.write(memory, entry, physical | bits);
    }
    /// Maps one large page (4 MiB with 32-bit entries, else 2 MiB).
    pub fn map_large(&mut self, memory: &GuestMemory, linear: u64, physical: u64, bits: u64) {
        let entry = self.entry(memory, linear, 2);
        self.write(memory, entry, physical | bits | page::LARGE);
    }
    /// The leaf entry of a 4 KiB page as the CPU left it.
    pub fn leaf(&mut self, memory: &GuestMemory, linear: u64) -> u64 {
        let entry = self.entry(memory, linear, 1);
        self.read(memory, entry)
    }
}
