//! Ages in buckets: four to an octave, so that seconds and days are told apart equally well.

/// Buckets. The last one has no end.
pub(super) const AGES: usize = 80;

/// The bucket of an age.
pub(super) fn bucket(age_s: u32) -> usize {
    if age_s < 4 {
        return age_s as usize;
    }
    let octave = age_s.ilog2();
    let quarter = (age_s >> (octave - 2)) & 3;
    (((octave - 1) * 4 + quarter) as usize).min(AGES - 1)
}

/// The first age of a bucket, seconds.
pub(super) fn start_s(bucket: usize) -> u32 {
    let bucket = u32::try_from(bucket).unwrap_or(u32::MAX).min(120);
    if bucket < 4 {
        return bucket;
    }
    let octave = bucket / 4 + 1;
    (4 + bucket % 4) << (octave - 2)
}

/// How long a bucket lasts, seconds.
pub(super) fn width_s(bucket: usize) -> u32 {
    start_s(bucket + 1) - start_s(bucket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_cover_every_age_once() {
        for bucket_index in 0..AGES {
            assert_eq!(bucket(start_s(bucket_index)), bucket_index);
            assert!(width_s(bucket_index) > 0);
            if bucket_index > 0 {
                assert_eq!(bucket(start_s(bucket_index) - 1), bucket_index - 1);
            }
        }
        assert_eq!(bucket(u32::MAX), AGES - 1);
    }
}
