//! Time for devices: the injected clock, and alarms.
use crate::{Device, lock};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

/// The only source of time of a device.
pub trait Clock: Send + Sync {
    /// Time that the machine has run: starts near zero, never goes back, stands still while the
    /// machine is paused, and goes on from the saved value after a restore.
    fn now(&self) -> Duration;
    /// The wall clock, as time since 1970-01-01 00:00:00 UTC.
    fn wall(&self) -> Duration;
}

/// A device's handle to ask for wake-ups ([`crate::AlarmDevice::on_alarm`]). It holds one
/// deadline; clones are the same alarm.
#[derive(Clone)]
pub struct Alarm {
    queue: Arc<AlarmQueue>,
    index: usize,
}

impl Alarm {
    /// Sets the deadline in [`Clock::now`] time, or clears it. A deadline in the past is due at
    /// once (on the I/O thread, not in this call).
    pub fn set(&self, deadline: Option<Duration>) {
        self.queue.set(self.index, deadline);
    }

    /// Says which device this alarm wakes.
    pub fn bind(&self, device: Weak<Mutex<dyn Device>>) {
        if let Some(entry) = lock(&self.queue.entries).get_mut(self.index) {
            entry.device = Some(device);
        }
    }
}

struct Entry {
    deadline: Option<Duration>,
    device: Option<Weak<Mutex<dyn Device>>>,
}

/// The deadlines of all devices of a machine. The I/O thread sleeps until
/// [`AlarmQueue::next_deadline`], then calls [`AlarmQueue::run_due`].
pub struct AlarmQueue {
    entries: Mutex<Vec<Entry>>,
    on_earlier: Box<dyn Fn() + Send + Sync>,
}

impl AlarmQueue {
    /// An empty queue. `on_earlier` is called, with a device's lock held, whenever the next
    /// deadline becomes earlier than it was: it wakes the I/O thread and returns.
    pub fn new(on_earlier: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { entries: Mutex::default(), on_earlier: Box::new(on_earlier) })
    }

    /// A new alarm, not set; [`Alarm::bind`] connects it with its device.
    pub fn register(self: &Arc<Self>) -> Alarm {
        let mut entries = lock(&self.entries);
        entries.push(Entry { deadline: None, device: None });
        Alarm { queue: Arc::clone(self), index: entries.len() - 1 }
    }

    /// The earliest deadline, in [`Clock::now`] time.
    pub fn next_deadline(&self) -> Option<Duration> {
        earliest(&lock(&self.entries))
    }

    /// Wakes each device whose deadline is not after `now`.
    pub fn run_due(&self, now: Duration) {
        let due: Vec<_> = lock(&self.entries)
            .iter_mut()
            .filter_map(|entry| {
                entry.deadline.take_if(|deadline| *deadline <= now)?;
                entry.device.as_ref()?.upgrade()
            })
            .collect();
        // Not under the queue's lock: devices set their alarms under their own.
        for device in due {
            if let Some(alarms) = lock(&device).alarms() {
                alarms.on_alarm(now);
            }
        }
    }

    fn set(&self, index: usize, deadline: Option<Duration>) {
        let mut entries = lock(&self.entries);
        let before = earliest(&entries);
        if let Some(entry) = entries.get_mut(index) {
            entry.deadline = deadline;
        }
        drop(entries);
        if deadline.is_some_and(|new| before.is_none_or(|old| new < old)) {
            (self.on_earlier)();
        }
    }
}

fn earliest(entries: &[Entry]) -> Option<Duration> {
    entries.iter().filter_map(|entry| entry.deadline).min()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AlarmDevice, RestoreError, SavedState, SharedDevice, share};
    use std::sync::atomic::{AtomicU32, Ordering};

    struct Sleeper(Vec<Duration>);
    impl Device for Sleeper {
        fn name(&self) -> &str {
            "sleeper"
        }
        fn alarms(&mut self) -> Option<&mut dyn AlarmDevice> {
            Some(self)
        }
        fn reset(&mut self) {}
        fn save(&self) -> SavedState {
            SavedState::stateless("sleeper")
        }
        fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
            state.reader("sleeper", 1)?.finish()
        }
    }
    impl AlarmDevice for Sleeper {
        fn on_alarm(&mut self, now: Duration) {
            self.0.push(now);
        }
    }

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn only_an_earlier_deadline_wakes_the_io_thread() {
        let wakes = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&wakes);
        let queue = AlarmQueue::new(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        let (a, b) = (queue.register(), queue.register());
        a.set(Some(ms(10)));
        b.set(Some(ms(20)));
        assert_eq!((wakes.load(Ordering::Relaxed), queue.next_deadline()), (1, Some(ms(10))));
        b.set(Some(ms(5)));
        assert_eq!((wakes.load(Ordering::Relaxed), queue.next_deadline()), (2, Some(ms(5))));
        b.set(None);
        a.set(None);
        assert_eq!((wakes.load(Ordering::Relaxed), queue.next_deadline()), (2, None));
    }

    #[test]
    fn a_due_alarm_wakes_its_device_once() {
        let queue = AlarmQueue::new(|| {});
        let alarm = queue.register();
        let sleeper = share(Sleeper(Vec::new()));
        let device: SharedDevice = sleeper.clone();
        alarm.bind(Arc::downgrade(&device));
        alarm.set(Some(ms(10)));
        queue.run_due(ms(9));
        queue.run_due(ms(11));
        queue.run_due(ms(12));
        assert_eq!(lock(&sleeper).0, [ms(11)]);
    }
}
