//! Address spaces, kept apart by type.
use core::fmt;

/// Size of the smallest page, in bytes (Intel SDM 3A 4.2).
pub const PAGE_SIZE: u64 = 4096;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);
        impl $name {
            /// The address of the page that holds this address.
            pub const fn page(self) -> Self { Self(self.0 & !(PAGE_SIZE - 1)) }
            /// The distance from the start of the page, in bytes (0 to 4095).
            pub const fn offset(self) -> u64 { self.0 & (PAGE_SIZE - 1) }
            /// The address `bytes` further on, or `None` past the end of the address space.
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) { Some(a) => Some(Self(a)), None => None }
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { write!(f, "{:#x}", self.0) }
        }
        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

address! {
    /// An address as the guest's buses see it: RAM, ROM and device registers.
    GuestPhysical
}
address! {
    /// A linear address of the guest: after segmentation, before paging.
    GuestVirtual
}
