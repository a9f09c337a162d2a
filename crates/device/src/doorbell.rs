//! Doorbells: guest writes that notify somebody without going over the bus.
use crate::GuestPhysical;
use std::any::Any;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// What is told when a doorbell rings. Closures are notifiers.
pub trait Notify: Send + Sync {
    /// The doorbell rang. Called on a vCPU's thread, which waits meanwhile, or with the lock of
    /// the device to which the doorbell belongs: it must not take that lock.
    fn notify(&self);

    /// An event that does the same when it is signalled (on Linux an eventfd to which one is
    /// added), so that an engine can ring without leaving the guest.
    fn event(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

impl<F: Fn() + Send + Sync> Notify for F {
    fn notify(&self) {
        self();
    }
}

/// A registered doorbell: it is taken down when this is dropped.
pub type DoorbellGuard = Box<dyn Any + Send + Sync>;

/// Where devices register doorbells.
pub trait Doorbells: Send + Sync {
    /// Has every guest write at `address`, whatever its width and value, ring. `None` where no
    /// doorbell can be had: such writes then go over the bus, which works all the same.
    fn register(&self, address: GuestPhysical, notify: Arc<dyn Notify>) -> Option<DoorbellGuard>;
}

/// A machine without doorbells: all writes go over the bus.
#[derive(Clone, Copy, Debug)]
pub struct NoDoorbells;

impl Doorbells for NoDoorbells {
    fn register(&self, _: GuestPhysical, _: Arc<dyn Notify>) -> Option<DoorbellGuard> {
        None
    }
}
