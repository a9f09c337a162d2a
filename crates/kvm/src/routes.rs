//! KVM's table of interrupt routes: the IOAPIC's level-triggered ones, and those of lines that
//! have an event.
//!
//! With the split interrupt chip, KVM tells of the end of an interrupt (KVM_EXIT_IOAPIC_EOI) only
//! where one of the routes reserved for the IOAPIC is level-triggered and names the vector
//! (api.rst §7.5). The machine's IOAPIC sends messages; each new level-triggered one becomes a
//! route here before it is signalled.
use engine::Msi;
use std::collections::BTreeMap;

/// Routes that KVM reserves for the IOAPIC, as many as ours has inputs.
pub const IOAPIC_ROUTES: usize = 24;
/// Trigger mode in a message's data: level (Intel SDM 3A 10.11.2).
const LEVEL: u32 = 1 << 15;

/// The level-triggered messages seen so far, the latest ones where there are more than routes.
#[derive(Debug, Default)]
pub struct LevelRoutes {
    routes: Vec<Msi>,
    oldest: usize,
}

impl LevelRoutes {
    /// Whether a message is level-triggered.
    pub fn concerns(message: Msi) -> bool {
        message.data & LEVEL != 0
    }

    /// Takes note of a message; answers whether the routes changed.
    pub fn note(&mut self, message: Msi) -> bool {
        if self.routes.contains(&message) {
            return false;
        }
        if self.routes.len() < IOAPIC_ROUTES {
            self.routes.push(message);
        } else if let Some(route) = self.routes.get_mut(self.oldest) {
            *route = message;
            self.oldest = (self.oldest + 1) % IOAPIC_ROUTES;
        }
        true
    }

    /// The routes, by number.
    pub fn list(&self) -> &[Msi] {
        &self.routes
    }
}

/// All routes of a VM.
#[derive(Debug, Default)]
pub struct Routes {
    /// The IOAPIC's, from 0 on.
    pub level: LevelRoutes,
    /// Those of lines, after the IOAPIC's; without a message there is no route.
    lines: BTreeMap<u32, Option<Msi>>,
}

impl Routes {
    /// Takes the first free number for a line, below `most`.
    pub fn new_line(&mut self, message: Option<Msi>, most: u32) -> Option<u32> {
        let gsi = (IOAPIC_ROUTES as u32..most).find(|gsi| !self.lines.contains_key(gsi))?;
        self.lines.insert(gsi, message);
        Some(gsi)
    }

    /// Changes a line's message; answers what it was.
    pub fn set_line(&mut self, gsi: u32, message: Option<Msi>) -> Option<Msi> {
        self.lines.get_mut(&gsi).and_then(|place| std::mem::replace(place, message))
    }

    /// Frees a line's number.
    pub fn end_line(&mut self, gsi: u32) {
        self.lines.remove(&gsi);
    }

    /// Every route: its number and message.
    pub fn list(&self) -> impl Iterator<Item = (u32, Msi)> {
        let level = (0..).zip(self.level.list().iter().copied());
        level.chain(self.lines.iter().filter_map(|(gsi, message)| Some((*gsi, (*message)?))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn level(vector: u32) -> Msi {
        Msi { address: 0xfee0_0000, data: LEVEL | vector }
    }

    #[test]
    fn only_level_triggered_messages_concern_the_ioapic() {
        assert!(LevelRoutes::concerns(level(0x30)));
        assert!(!LevelRoutes::concerns(Msi { address: 0xfee0_0000, data: 0x30 }));
    }

    #[test]
    fn a_message_becomes_a_route_once_and_the_oldest_gives_way() {
        let mut routes = LevelRoutes::default();
        assert!(routes.note(level(0x20)));
        assert!(!routes.note(level(0x20)));
        for vector in 0x21..0x20 + IOAPIC_ROUTES as u32 {
            assert!(routes.note(level(vector)));
        }
        assert!(routes.note(level(0x90)));
        assert_eq!(routes.list().len(), IOAPIC_ROUTES);
        assert!(routes.list().contains(&level(0x90)) && !routes.list().contains(&level(0x20)));
    }

    #[test]
    fn lines_come_after_the_ioapic_and_their_numbers_are_used_again() {
        let mut routes = Routes::default();
        routes.level.note(level(0x20));
        let edge = Msi { address: 0xfee0_0000, data: 0x31 };
        assert_eq!(routes.new_line(None, 26), Some(24));
        assert_eq!(routes.new_line(Some(edge), 26), Some(25));
        assert_eq!(routes.new_line(None, 26), None);
        assert_eq!(routes.list().collect::<Vec<_>>(), [(0, level(0x20)), (25, edge)]);
        routes.set_line(24, Some(edge));
        routes.end_line(25);
        assert_eq!(routes.list().collect::<Vec<_>>(), [(0, level(0x20)), (24, edge)]);
        assert_eq!(routes.new_line(None, 26), Some(25));
    }
}
