//! UTC dates for people: from Unix seconds and back, by the proleptic Gregorian calendar. No zones, no leap seconds.

/// Seconds of a day.
pub(crate) const DAY_S: u64 = 86_400;

/// `2026-11-23T11:40:00Z`.
pub(crate) fn utc(unix_s: u64) -> String {
    let (year, month, day) = date(unix_s / DAY_S);
    let second = unix_s % DAY_S;
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

/// `2026-11-23T11:40:00.123Z`.
pub(crate) fn utc_ms(unix_ms: u64) -> String {
    let text = utc(unix_ms / 1000);
    format!("{}.{:03}Z", text.trim_end_matches('Z'), unix_ms % 1000)
}

/// Start of the month that a moment lies in, and of the next one.
pub(crate) fn month(unix_s: u64) -> (u64, u64) {
    let (year, month, _) = date(unix_s / DAY_S);
    let next = if month == 12 { (year + 1, 1) } else { (year, month + 1) };
    (days(year, month, 1) * DAY_S, days(next.0, next.1, 1) * DAY_S)
}

/// A moment as people write it: `2026-11-23`, `2026-11-23T11`, `2026-11-23T11:40`, with or without `Z`.
pub(crate) fn parse(text: &str) -> Option<u64> {
    let text = text.strip_suffix('Z').unwrap_or(text);
    let (day, time) = text.split_once('T').unwrap_or((text, "0"));
    let mut parts = day.split('-').map(|part| part.parse::<u64>().ok());
    let (year, month, day) = (parts.next()??, parts.next()??, parts.next()??);
    let mut clock = time.split(':').map(|part| part.parse::<u64>().ok());
    let hour = clock.next()??;
    let minute = clock.next().unwrap_or(Some(0))?;
    let second = clock.next().unwrap_or(Some(0))?;
    let whole = parts.next().is_none() && clock.next().is_none();
    let sound = (1970..=9999).contains(&year)
        && (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && hour < 24
        && minute < 60;
    if !whole || !sound || second >= 60 {
        return None;
    }
    let at = days(year, month, day);
    // A day that the month does not have is another month's.
    (date(at) == (year, month, day)).then(|| at * DAY_S + hour * 3600 + minute * 60 + second)
}

/// Year, month and day of a day since 1970-01-01. Years begin in March here, so that a leap day is a year's last.
fn date(day: u64) -> (u64, u64, u64) {
    let day = day + 719_468;
    let (era, of_era) = (day / 146_097, day % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, of_year - (153 * shifted + 2) / 5 + 1)
}

/// Days since 1970-01-01.
fn days(year: u64, month: u64, day: u64) -> u64 {
    let year = year - u64::from(month <= 2);
    let (era, of_era) = (year / 400, year % 400);
    let shifted = if month > 2 { month - 3 } else { month + 9 };
    let of_year = (153 * shifted + 2) / 5 + day - 1;
    (era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year) - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(utc(1_483_228_799), "2016-12-31T23:59:59Z");
        assert_eq!(utc_ms(1_795_434_000_123), "2026-11-23T11:40:00.123Z");
        assert_eq!(parse("2026-11-23T11:40"), Some(1_795_434_000));
        assert_eq!(parse("2026-11-23"), Some(1_795_392_000));
        assert_eq!(parse("2026-11-23T11Z"), Some(1_795_431_600));
        for bad in
            ["", "2026", "2026-02-30", "2026-13-01", "2026-11-23T24", "2026-11-23T11:60", "x-1-1", "1-2-3-4"]
        {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn every_day_comes_back() {
        for day in 0..80_000 {
            let (year, month, of_month) = date(day);
            assert_eq!(days(year, month, of_month), day);
            let (start, end) = month_of(day);
            assert!(start <= day && day < end && (28..=31).contains(&(end - start)));
        }
    }

    fn month_of(day: u64) -> (u64, u64) {
        let (start, end) = month(day * DAY_S);
        (start / DAY_S, end / DAY_S)
    }

    #[test]
    fn a_day_that_no_month_has_is_none() {
        for bad in ["2026-03-00", "2026-03-32", "2026-03-18446744073709551615", "2026-02-29"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
