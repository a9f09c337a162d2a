//! Who receives an interrupt message (Intel SDM 3A 11.6.2, 11.12.10).
use crate::vm::{ApicIdentity, Mailbox, VmShared, pending};
use engine::Msi;
use std::sync::atomic::Ordering;

/// Delivery modes (Intel SDM 3A 11.6.1).
mod mode {
    pub const FIXED: u8 = 0;
    pub const LOWEST: u8 = 1;
    pub const NMI: u8 = 4;
    pub const INIT: u8 = 5;
    pub const STARTUP: u8 = 6;
}

/// An interrupt message on its way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message {
    pub destination: u32,
    /// The destination that means all.
    pub broadcast: u32,
    pub logical: bool,
    pub mode: u8,
    pub vector: u8,
    pub level: bool,
    /// The level of INIT: its de-assertion does nothing.
    pub assert: bool,
}

/// Destinations that need no address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shorthand {
    None,
    Only(u32),
    All,
    AllBut(u32),
}

/// Sends a message to all whom it concerns.
pub(crate) fn route(vm: &VmShared, message: &Message, shorthand: Shorthand) {
    let mut hits = vm.mailboxes.iter().enumerate().filter(|(i, mailbox)| match shorthand {
        Shorthand::None => matches(&mailbox.apic, message),
        Shorthand::Only(n) => *i == n as usize,
        Shorthand::All => true,
        Shorthand::AllBut(n) => *i != n as usize,
    });
    if message.mode == mode::LOWEST {
        // Any of the lowest priority will do; vectors spread over the candidates.
        let able: Vec<_> =
            hits.filter(|(_, m)| m.apic.enabled.load(Ordering::SeqCst)).map(|(_, m)| m).collect();
        if let Some(mailbox) = able.get(usize::from(message.vector) % able.len().max(1)) {
            deliver(mailbox, message);
        }
        return;
    }
    if let Shorthand::Only(_) = shorthand {
        if let Some((_, mailbox)) = hits.next() {
            deliver(mailbox, message);
        }
        return;
    }
    hits.for_each(|(_, mailbox)| deliver(mailbox, message));
}

fn matches(apic: &ApicIdentity, message: &Message) -> bool {
    let destination = message.destination;
    let x2apic = apic.x2apic.load(Ordering::SeqCst);
    if destination == message.broadcast || (destination == 0xff && !x2apic) {
        return true;
    }
    if !message.logical {
        return destination == apic.id.load(Ordering::SeqCst);
    }
    let ldr = apic.ldr.load(Ordering::SeqCst);
    if x2apic {
        return destination >> 16 == ldr >> 16 && destination & ldr & 0xffff != 0;
    }
    if apic.dfr.load(Ordering::SeqCst) >> 28 == 0xf {
        return destination & ldr & 0xff != 0;
    }
    destination >> 4 & 0xf == ldr >> 4 & 0xf && destination & ldr & 0xf != 0
}

fn deliver(mailbox: &Mailbox, message: &Message) {
    match message.mode {
        mode::FIXED | mode::LOWEST
            if message.vector >= 16 && mailbox.apic.enabled.load(Ordering::SeqCst) =>
        {
            mailbox.request(message.vector, message.level);
        }
        mode::NMI => mailbox.post(pending::NMI),
        mode::INIT if message.assert || !message.level => mailbox.post(pending::INIT),
        mode::STARTUP => {
            mailbox.sipi_vector.store(u32::from(message.vector), Ordering::SeqCst);
            mailbox.post(pending::SIPI);
        }
        // SMI and ExtINT as messages do not exist on this machine.
        _ => {}
    }
}

/// Delivers a message-signalled interrupt (Intel SDM 3A 11.11).
pub fn route_msi(vm: &VmShared, msi: Msi) {
    if msi.address >> 20 != 0xfee {
        return;
    }
    // Bits 5 to 11 extend the destination to 15 bits where an IOAPIC or device sets them.
    let destination = (msi.address >> 12 & 0xff) as u32 | ((msi.address >> 5 & 0x7f) as u32) << 8;
    let message = Message {
        destination,
        broadcast: 0xff,
        logical: msi.address & 4 != 0,
        mode: (msi.data >> 8 & 7) as u8,
        vector: msi.data as u8,
        level: msi.data & 1 << 15 != 0,
        assert: true,
    };
    route(vm, &message, Shorthand::None);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(id: u32, ldr: u32, dfr: u32, x2apic: bool) -> ApicIdentity {
        let apic = ApicIdentity::default();
        apic.id.store(id, Ordering::SeqCst);
        apic.ldr.store(ldr, Ordering::SeqCst);
        apic.dfr.store(dfr, Ordering::SeqCst);
        apic.x2apic.store(x2apic, Ordering::SeqCst);
        apic
    }

    fn to(destination: u32, logical: bool, broadcast: u32) -> Message {
        Message {
            destination,
            broadcast,
            logical,
            mode: 0,
            vector: 0x40,
            level: false,
            assert: true,
        }
    }

    #[test]
    fn a_physical_destination_names_one_apic_and_ff_names_all() {
        let apic = identity(3, 0, u32::MAX, false);
        assert!(matches(&apic, &to(3, false, 0xff)));
        assert!(!matches(&apic, &to(2, false, 0xff)));
        assert!(matches(&apic, &to(0xff, false, 0xff)));
    }

    #[test]
    fn a_flat_logical_destination_is_a_set_of_bits() {
        let apic = identity(0, 0b100, u32::MAX, false);
        assert!(matches(&apic, &to(0b110, true, 0xff)));
        assert!(!matches(&apic, &to(0b011, true, 0xff)));
    }

    #[test]
    fn a_cluster_destination_must_name_the_cluster_and_the_member() {
        let apic = identity(0, 0x22, 0x0fff_ffff, false);
        assert!(matches(&apic, &to(0x2f, true, 0xff)));
        assert!(!matches(&apic, &to(0x1f, true, 0xff)));
        assert!(!matches(&apic, &to(0x2d, true, 0xff)));
    }

    #[test]
    fn an_x2apic_destination_has_sixteen_members_a_cluster() {
        let apic = identity(17, 0x1_0002, u32::MAX, true);
        assert!(matches(&apic, &to(0x1_0003, true, u32::MAX)));
        assert!(!matches(&apic, &to(0x0_0002, true, u32::MAX)));
        assert!(!matches(&apic, &to(0xff, false, u32::MAX)));
        assert!(matches(&apic, &to(u32::MAX, false, u32::MAX)));
    }
}
