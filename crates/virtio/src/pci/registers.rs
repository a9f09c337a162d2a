//! The common configuration structure (§4.1.4.3): feature negotiation, status, queue set-up.
use super::link::Link;
use crate::queue::{MAX_SIZE, Position, QueueAddresses};
use crate::{feature, read_bytes};
use device::state::{Reader, SaveFields};
use device::{GuestPhysical, RestoreError, SavedState, Width, lock, saved_fields};

/// Device status (§2.1).
pub mod status {
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// The features are settled.
    pub const FEATURES_OK: u8 = 8;
    /// The device has failed.
    pub const NEEDS_RESET: u8 = 0x40;
}

/// Offsets in the structure.
mod at {
    pub const DEVICE_FEATURE_SELECT: usize = 0;
    pub const DEVICE_FEATURE: usize = 4;
    pub const DRIVER_FEATURE_SELECT: usize = 8;
    pub const DRIVER_FEATURE: usize = 12;
    pub const CONFIG_VECTOR: usize = 16;
    pub const QUEUES: usize = 18;
    pub const STATUS: usize = 20;
    pub const QUEUE_SELECT: usize = 22;
    pub const QUEUE_SIZE: usize = 24;
    pub const QUEUE_VECTOR: usize = 26;
    pub const QUEUE_ENABLE: usize = 28;
    pub const QUEUE_NOTIFY: usize = 30;
    pub const DESCRIPTORS: usize = 32;
    pub const AVAILABLE: usize = 40;
    pub const USED: usize = 48;
    pub const END: usize = 56;
}
/// Bytes of the structure.
pub const LENGTH: u32 = at::END as u32;

/// What a driver has set of one queue.
#[derive(Clone, Debug)]
pub struct QueueRegisters {
    /// The largest size.
    pub most: u16,
    /// The size, a power of two.
    pub size: u16,
    /// The driver has enabled it.
    pub enabled: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    next_available: u16,
    next_used: u16,
}

saved_fields!(
    QueueRegisters: size, enabled, descriptors, available, used, next_available, next_used
);

impl QueueRegisters {
    fn new(most: u16) -> Self {
        Self {
            most,
            size: most,
            enabled: false,
            descriptors: 0,
            available: 0,
            used: 0,
            next_available: 0,
            next_used: 0,
        }
    }

    /// Where the queue is.
    pub fn addresses(&self) -> QueueAddresses {
        QueueAddresses {
            descriptors: GuestPhysical(self.descriptors),
            available: GuestPhysical(self.available),
            used: GuestPhysical(self.used),
        }
    }

    /// How far the device has come, while it is not active.
    pub fn position(&self) -> Position {
        Position { available: self.next_available, used: self.next_used }
    }

    /// Notes how far the device has come.
    pub fn set_position(&mut self, position: Position) {
        (self.next_available, self.next_used) = (position.available, position.used);
    }

    fn is_possible(size: u16, most: u16) -> bool {
        size.is_power_of_two() && size <= most.min(MAX_SIZE)
    }
}

/// What a write means beyond the register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The driver is ready.
    DriverOk,
    /// The driver resets the device.
    Reset,
}

/// The registers.
pub struct Registers {
    offered: u64,
    device_select: u32,
    driver_select: u32,
    /// What the driver accepted so far.
    pub driver_features: u64,
    /// Without NEEDS_RESET, which is the link's.
    pub status: u8,
    queue_select: u16,
    /// The queues.
    pub queues: Vec<QueueRegisters>,
}

impl Registers {
    /// The registers after reset.
    pub fn new(offered: u64, queues: &[u16]) -> Self {
        Self {
            offered,
            device_select: 0,
            driver_select: 0,
            driver_features: 0,
            status: 0,
            queue_select: 0,
            queues: queues.iter().map(|most| QueueRegisters::new(*most)).collect(),
        }
    }

    /// As after reset.
    pub fn reset(&mut self) {
        let most: Vec<_> = self.queues.iter().map(|queue| queue.most).collect();
        *self = Self::new(self.offered, &most);
    }

    /// Whether the driver is ready.
    pub fn is_driver_ok(&self) -> bool {
        self.status & status::DRIVER_OK != 0
    }

    /// Reads `data.len()` bytes.
    pub fn read(&self, offset: usize, data: &mut [u8], link: &Link) {
        read_bytes(&self.image(link), offset, data);
    }

    /// All registers as they read now.
    fn image(&self, link: &Link) -> [u8; at::END] {
        let mut image = [0; at::END];
        let mut put = |at: usize, bytes: &[u8]| {
            image.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
        };
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        put(at::DEVICE_FEATURE_SELECT, &self.device_select.to_le_bytes());
        put(at::DEVICE_FEATURE, &half(self.offered, self.device_select).to_le_bytes());
        put(at::DRIVER_FEATURE_SELECT, &self.driver_select.to_le_bytes());
        put(at::DRIVER_FEATURE, &half(self.driver_features, self.driver_select).to_le_bytes());
        put(at::QUEUES, &(self.queues.len() as u16).to_le_bytes());
        let failed = if link.has_failed() { status::NEEDS_RESET } else { 0 };
        // The generation of the device's configuration follows.
        put(at::STATUS, &[self.status | failed, link.generation()]);
        put(at::QUEUE_SELECT, &self.queue_select.to_le_bytes());
        let interrupts = lock(&link.interrupts);
        put(at::CONFIG_VECTOR, &interrupts.config.to_le_bytes());
        // A queue that is not there has size 0, and the rest is 0 too (§4.1.4.3.1).
        let select = usize::from(self.queue_select);
        if let (Some(queue), Some(vector)) =
            (self.queues.get(select), interrupts.queues.get(select))
        {
            put(at::QUEUE_SIZE, &queue.size.to_le_bytes());
            put(at::QUEUE_VECTOR, &vector.to_le_bytes());
            put(at::QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(at::QUEUE_NOTIFY, &self.queue_select.to_le_bytes());
            put(at::DESCRIPTORS, &queue.descriptors.to_le_bytes());
            put(at::AVAILABLE, &queue.available.to_le_bytes());
            put(at::USED, &queue.used.to_le_bytes());
        }
        image
    }

    /// Writes a register, in the width of its field (§4.1.3.1); 64-bit ones in halves too. Other
    /// accesses do nothing, nor do those that come too late or make no sense.
    pub fn write(&mut self, offset: usize, width: Width, value: u64, link: &Link) -> Effect {
        match (offset, width) {
            (at::DEVICE_FEATURE_SELECT, Width::Dword) => self.device_select = value as u32,
            (at::DRIVER_FEATURE_SELECT, Width::Dword) => self.driver_select = value as u32,
            (at::DRIVER_FEATURE, Width::Dword) => self.accept(value as u32),
            (at::CONFIG_VECTOR, Width::Word) => {
                let mut interrupts = lock(&link.interrupts);
                interrupts.config = interrupts.vector(value as u16);
            }
            (at::STATUS, Width::Byte) => return self.write_status(value as u8),
            (at::QUEUE_SELECT, Width::Word) => self.queue_select = value as u16,
            (at::QUEUE_VECTOR, Width::Word) => {
                let mut interrupts = lock(&link.interrupts);
                let vector = interrupts.vector(value as u16);
                if let Some(to) = interrupts.queues.get_mut(usize::from(self.queue_select)) {
                    *to = vector;
                }
            }
            _ => self.write_queue(offset, width, value),
        }
        Effect::None
    }

    fn accept(&mut self, features: u32) {
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        let features = u64::from(features);
        self.driver_features = match self.driver_select {
            0 => self.driver_features & !0xffff_ffff | features,
            1 => self.driver_features & 0xffff_ffff | features << 32,
            // Bits that are never offered: kept in mind as one that cannot be accepted.
            _ if features != 0 => self.driver_features | !self.offered,
            _ => self.driver_features,
        };
    }

    fn write_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        // A driver only adds bits (§2.1.1).
        let mut new = (self.status | value) & !status::NEEDS_RESET;
        let added = new & !self.status;
        if added & status::FEATURES_OK != 0 && !self.features_fit() {
            new &= !status::FEATURES_OK;
        }
        if added & status::DRIVER_OK != 0 && new & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        self.status = new;
        if added & new & status::DRIVER_OK != 0 { Effect::DriverOk } else { Effect::None }
    }

    fn features_fit(&self) -> bool {
        self.driver_features & !self.offered == 0 && self.driver_features & feature::VERSION_1 != 0
    }

    /// Queues freeze when the driver is ready, each one when it is enabled.
    fn write_queue(&mut self, offset: usize, width: Width, value: u64) {
        let frozen = self.is_driver_ok();
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        if frozen || queue.enabled {
            return;
        }
        let field = match offset & !7 {
            at::DESCRIPTORS => &mut queue.descriptors,
            at::AVAILABLE => &mut queue.available,
            at::USED => &mut queue.used,
            _ => match (offset, width) {
                (at::QUEUE_SIZE, Width::Word)
                    if QueueRegisters::is_possible(value as u16, queue.most) =>
                {
                    queue.size = value as u16;
                    return;
                }
                (at::QUEUE_ENABLE, Width::Word) => {
                    queue.enabled = value == 1;
                    return;
                }
                _ => return,
            },
        };
        *field = match (offset % 8, width) {
            (0, Width::Qword) => value,
            (0, Width::Dword) => *field & !0xffff_ffff | value,
            (4, Width::Dword) => *field & 0xffff_ffff | value << 32,
            _ => *field,
        };
    }

    /// Saves everything, with what of the link belongs here.
    pub fn save(&self, state: &mut SavedState, link: &Link) {
        state.put("device_select", &self.device_select);
        state.put("driver_select", &self.driver_select);
        state.put("driver_features", &self.driver_features);
        state.put("status", &self.status);
        state.put("failed", &link.has_failed());
        state.put("isr", &link.isr());
        state.put("generation", &link.generation());
        state.put("queue_select", &self.queue_select);
        let interrupts = lock(&link.interrupts);
        state.put("config_vector", &interrupts.config);
        for (n, (queue, vector)) in self.queues.iter().zip(&interrupts.queues).enumerate() {
            queue.save_fields(&format!("queue{n}_"), state);
            state.put(&format!("queue{n}_vector"), vector);
        }
        interrupts.msix.save_fields("msix_", state);
    }

    /// Takes everything back.
    pub fn restore(&mut self, from: &mut Reader<'_>, link: &Link) -> Result<(), RestoreError> {
        self.device_select = from.get("device_select")?;
        self.driver_select = from.get("driver_select")?;
        self.driver_features = from.get("driver_features")?;
        let settled = self.features_fit();
        let possible = |status: &u8| {
            let ready = status & status::DRIVER_OK != 0;
            let agreed = status & status::FEATURES_OK != 0;
            status & status::NEEDS_RESET == 0 && (!agreed || settled) && (!ready || agreed)
        };
        self.status = from.get_if("status", possible)?;
        let (failed, isr) = (from.get("failed")?, from.get_if("isr", |isr: &u8| *isr < 4)?);
        link.restore(isr, failed, from.get("generation")?);
        self.queue_select = from.get("queue_select")?;
        let mut interrupts = lock(&link.interrupts);
        interrupts.config = from.get("config_vector")?;
        for (n, queue) in self.queues.iter_mut().enumerate() {
            queue.restore_fields(&format!("queue{n}_"), from)?;
            if !QueueRegisters::is_possible(queue.size, queue.most) {
                return Err(from.out_of_range(&format!("queue{n}_size")));
            }
            let vector = from.get(&format!("queue{n}_vector"))?;
            interrupts.queues.iter_mut().skip(n).take(1).for_each(|to| *to = vector);
        }
        interrupts.msix.restore_fields("msix_", from)
    }
}
