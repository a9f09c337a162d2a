//! The machine's time: it stands still while the machine is paused.
use device::{Clock, lock};
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

#[derive(Clone, Copy)]
struct Time {
    /// Time that the machine had run when it was last started or stopped.
    base: Duration,
    /// When it was started, while it runs.
    since: Option<Instant>,
}

impl Time {
    fn now(&self) -> Duration {
        self.base + self.since.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

/// The clock that devices see.
pub struct MachineClock(Mutex<Time>);

impl MachineClock {
    /// A clock at zero that stands still.
    pub fn stopped() -> Self {
        Self(Mutex::new(Time { base: Duration::ZERO, since: None }))
    }

    /// Lets time pass.
    pub fn start(&self) {
        lock(&self.0).since.get_or_insert_with(Instant::now);
    }

    /// Stops time.
    pub fn stop(&self) {
        let mut time = lock(&self.0);
        *time = Time { base: time.now(), since: None };
    }

    /// How long to sleep until the clock shows `deadline`; `None` while it stands still.
    pub fn until(&self, deadline: Duration) -> Option<Duration> {
        let time = *lock(&self.0);
        time.since.map(|_| deadline.saturating_sub(time.now()))
    }
}

impl Clock for MachineClock {
    fn now(&self) -> Duration {
        lock(&self.0).now()
    }

    fn wall(&self) -> Duration {
        // A host whose clock is before 1970 gets a guest in 1970.
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_stands_still_while_the_machine_does() {
        let clock = MachineClock::stopped();
        assert_eq!(clock.now(), Duration::ZERO);
        assert_eq!(clock.until(Duration::from_secs(1)), None);
        clock.start();
        let mut now = clock.now();
        while now.is_zero() {
            now = clock.now();
        }
        assert!(clock.until(now + Duration::from_secs(3600)).is_some());
        clock.stop();
        let stopped = clock.now();
        assert!(stopped >= now);
        assert_eq!(clock.now(), stopped);
        clock.start();
        assert!(clock.now() >= stopped);
    }
}
