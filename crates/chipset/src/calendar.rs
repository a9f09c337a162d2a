//! Dates and times of day for the RTC: the proleptic Gregorian calendar in UTC.

/// Seconds of a day.
pub const SECONDS_PER_DAY: u64 = 86_400;

/// A moment as a calendar shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct DateTime {
    pub year: u16,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    /// 1 (Sunday) to 7.
    pub weekday: u8,
    pub hour: u8,
    pub minute: u8,
    pub second: u8,
}

impl DateTime {
    /// From seconds since 1970. Years beyond 9999 are shown as 9999.
    pub fn from_unix(seconds: u64) -> Self {
        let (days, time) = (seconds / SECONDS_PER_DAY, seconds % SECONDS_PER_DAY);
        // Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days: years
        // begin in March, so that the leap day is the last of its year.
        let days_since_0 = days + 719_468;
        let (era, day_of_era) = (days_since_0 / 146_097, days_since_0 % 146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        let year = year_of_era + era * 400 + u64::from(month <= 2);
        Self {
            year: year.min(9999) as u16,
            month: month as u8,
            day: (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u8,
            weekday: ((days + 4) % 7 + 1) as u8,
            hour: (time / 3600) as u8,
            minute: (time / 60 % 60) as u8,
            second: (time % 60) as u8,
        }
    }

    /// To seconds since 1970; zero for earlier dates. Fields out of range are brought into it.
    pub fn to_unix(self) -> u64 {
        let month = u64::from(self.month.clamp(1, 12));
        let day = u64::from(self.day.clamp(1, 31));
        // days_from_civil of the same source.
        let year = u64::from(self.year).saturating_sub(u64::from(month <= 2));
        let (era, year_of_era) = (year / 400, year % 400);
        let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = (era * 146_097 + day_of_era).saturating_sub(719_468);
        let time = u64::from(self.hour.min(23)) * 3600
            + u64::from(self.minute.min(59)) * 60
            + u64::from(self.second.min(59));
        days * SECONDS_PER_DAY + time
    }
}

/// Seconds from the time of day `from` (in seconds) to the next that has the wanted hour, minute
/// and second, where `None` matches any; `None` where no time of day matches.
pub fn next_match(from: u32, wanted: [Option<u8>; 3]) -> Option<u32> {
    let [hour, minute, second] = wanted.map(|w| w.map(u32::from));
    // The first value from `start` on that matches, below `limit`.
    let first = |wanted: Option<u32>, start: u32, limit: u32| match wanted {
        Some(w) => (w >= start && w < limit).then_some(w),
        None => (start < limit).then_some(start),
    };
    let in_hour = |start: u32| {
        let (m, s) = (start / 60, start % 60);
        first(second, s, 60)
            .filter(|_| first(minute, m, 60) == Some(m))
            .map(|s| m * 60 + s)
            .or_else(|| Some(first(minute, m + 1, 60)? * 60 + first(second, 0, 60)?))
    };
    (0..=24).find_map(|ahead| {
        let this_hour = from / 3600 + ahead;
        first(hour, this_hour % 24, 24).filter(|h| *h == this_hour % 24)?;
        let start = if ahead == 0 { from % 3600 } else { 0 };
        Some(this_hour * 3600 + in_hour(start)? - from)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_day_of_400_years_converts_there_and_back() {
        for day in 0..146_097 {
            let seconds = day * SECONDS_PER_DAY + 12_345;
            assert_eq!(DateTime::from_unix(seconds).to_unix(), seconds);
        }
        let t = DateTime::from_unix(951_782_400);
        assert_eq!((t.year, t.month, t.day, t.weekday), (2000, 2, 29, 3), "a Tuesday");
    }

    #[test]
    fn the_next_match_is_the_first_second_that_matches() {
        let matches = |time: u32, wanted: [Option<u8>; 3]| {
            let is = [time / 3600, time / 60 % 60, time % 60];
            is.iter().zip(wanted).all(|(is, wanted)| wanted.is_none_or(|w| *is == u32::from(w)))
        };
        let choices = [None, Some(0), Some(7), Some(23)];
        for h in choices {
            for m in choices {
                for s in choices {
                    let wanted = [h, m, s];
                    for from in (0..86_400).step_by(2_741) {
                        let expect = (0..=86_400).find(|d| matches((from + d) % 86_400, wanted));
                        assert_eq!(next_match(from, wanted), expect, "{from} {wanted:?}");
                    }
                }
            }
        }
        assert_eq!(next_match(0, [Some(99), None, None]), None);
    }
}
