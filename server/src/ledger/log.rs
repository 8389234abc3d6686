//! The log: segments, appended to by one thread.
//!
//! Order of every append, never another: bytes into the segment, flush, head, acknowledge. What a failed write or flush leaves
//! on the disk is unknown, so after one the log takes nothing more until it is opened again.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use super::frame::{self, ChainHash, HEADER_BYTES};
use super::head::{Head, HeadFile};
use super::hooks::Hooks;
use super::segment::{self, RECORDS_START, SegmentHeader};
use super::{LedgerError, LedgerSettings};

/// A place between two records, and what the ledger is up to there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Position {
    pub(crate) segment: u64,
    pub(crate) offset: u64,
    /// Of the last record before.
    pub(crate) sequence: u64,
    /// Of that record; `None` where it cannot be read.
    pub(crate) chain: Option<ChainHash>,
}

/// Where one record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) sequence: u64,
    pub(crate) segment: u64,
    pub(crate) offset: u64,
}

/// See the module.
pub(crate) struct Log {
    dir: PathBuf,
    settings: LedgerSettings,
    hooks: Hooks,
    file: File,
    segment: u64,
    end: u64,
    sequence: u64,
    chain: ChainHash,
    head: HeadFile,
    segments: u64,
    spare: Spare,
    /// There was no space for a spare segment the last time.
    starved: bool,
    failed: bool,
}

/// The segment that comes next.
enum Spare {
    None,
    Preparing(JoinHandle<io::Result<File>>),
    Ready(File),
}

impl Log {
    /// Goes on at `at`, which must be the end of the last segment.
    pub(crate) fn resume(
        dir: &Path,
        settings: LedgerSettings,
        hooks: Hooks,
        at: &Position,
        head: HeadFile,
    ) -> io::Result<Self> {
        let path = segment::path(dir, at.segment);
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let segments = segment::numbers(dir)?.len() as u64;
        let mut log = Self {
            dir: dir.to_owned(),
            settings,
            hooks,
            file,
            segment: at.segment,
            end: at.offset,
            sequence: at.sequence,
            chain: at.chain.unwrap_or_default(),
            head,
            segments,
            spare: Spare::None,
            starved: false,
            failed: false,
        };
        log.prepare();
        Ok(log)
    }

    pub(crate) fn position(&self) -> Position {
        let (segment, offset, sequence) = (self.segment, self.end, self.sequence);
        Position { segment, offset, sequence, chain: Some(self.chain) }
    }

    /// Bytes of records that fit without a new segment: what is left for accounts that are open already.
    pub(crate) fn room_bytes(&self) -> u64 {
        let spare = if matches!(self.spare, Spare::None) { 0 } else { self.settings.segment_bytes };
        self.settings.segment_bytes.saturating_sub(self.end) + spare
    }

    /// Bytes on disk, the spare segment included.
    pub(crate) fn disk_bytes(&self) -> u64 {
        let spare = u64::from(!matches!(self.spare, Spare::None));
        (self.segments + spare) * self.settings.segment_bytes
    }

    pub(crate) fn segment_bytes(&self) -> u64 {
        self.settings.segment_bytes
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.failed
    }

    /// Appends payloads in order and flushes them. Gives the places of those that are durable, and what kept out the rest.
    pub(crate) fn append(&mut self, payloads: &[Vec<u8>]) -> (Vec<Place>, Option<LedgerError>) {
        let mut places = Vec::with_capacity(payloads.len());
        while places.len() < payloads.len() {
            let result = self.append_some(&payloads[places.len()..], &mut places);
            if let Err(error) = result {
                return (places, Some(error));
            }
        }
        (places, None)
    }

    /// Appends what fits into the segment; goes to the next one if nothing does.
    fn append_some(&mut self, payloads: &[Vec<u8>], places: &mut Vec<Place>) -> Result<(), LedgerError> {
        if self.failed {
            return Err(LedgerError::Failed);
        }
        let flushed = self.sequence;
        let (mut sequence, mut chain, mut buffer, mut some) =
            (self.sequence, self.chain, Vec::new(), Vec::new());
        for payload in payloads {
            let len = (HEADER_BYTES + payload.len()) as u64;
            let offset = self.end + buffer.len() as u64;
            if offset + len > self.settings.segment_bytes || payload.len() > frame::MAX_PAYLOAD_BYTES {
                break;
            }
            sequence += 1;
            chain = frame::write(&mut buffer, sequence, flushed, &chain, payload);
            some.push(Place { sequence, segment: self.segment, offset });
        }
        if some.is_empty() {
            let len_bytes = payloads.first().map_or(0, Vec::len);
            let fits_nowhere = self.end == RECORDS_START || len_bytes > frame::MAX_PAYLOAD_BYTES;
            return if fits_nowhere { Err(LedgerError::TooLarge { len_bytes }) } else { self.roll() };
        }
        self.write(&buffer).map_err(|error| self.fail(&error))?;
        (self.sequence, self.chain) = (sequence, chain);
        self.end += buffer.len() as u64;
        places.extend(some);
        Ok(())
    }

    fn write(&self, buffer: &[u8]) -> io::Result<()> {
        if let Some(part) = self.hooks.torn("log.torn", buffer.len()) {
            self.file.write_all_at(&buffer[..part], self.end)?;
            self.hooks.die();
        }
        self.hooks.at("log.write")?;
        self.file.write_all_at(buffer, self.end)?;
        self.hooks.at("log.sync")?;
        self.file.sync_data()?;
        self.hooks.at("log.synced")
    }

    /// Notes in the head what is durable. The head is no condition of an acknowledgement: it is checked by the records.
    pub(crate) fn note(&mut self, unix_ms: u64, (since_boot_ms, boot): (u64, [u8; 16])) {
        let (sequence, segment, end, chain) = (self.sequence, self.segment, self.end, self.chain);
        let head = Head { sequence, segment, end, chain, unix_ms, since_boot_ms, boot };
        if let Err(error) = self.head.write(&head) {
            tracing::error!(%error, "the ledger's head cannot be written: a cut end would go unnoticed");
        }
    }

    pub(crate) fn sync_head(&self) {
        if let Err(error) = self.head.sync() {
            tracing::error!(%error, "the ledger's head cannot be flushed");
        }
    }

    /// Reads the record at a place, as it stands on the disk.
    pub(crate) fn read(&self, segment: u64, offset: u64) -> io::Result<Vec<u8>> {
        let other;
        let file = if segment == self.segment {
            &self.file
        } else {
            other = File::open(segment::path(&self.dir, segment))?;
            &other
        };
        let mut bytes = vec![0; HEADER_BYTES];
        file.read_exact_at(&mut bytes, offset)?;
        let len = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]) as usize;
        bytes.resize(HEADER_BYTES + len.min(frame::MAX_PAYLOAD_BYTES), 0);
        file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// Makes the next segment ready in the background, if there is none and it may have the space.
    pub(crate) fn prepare(&mut self) {
        self.look();
        let with_spare = (self.segments + 1).saturating_mul(self.settings.segment_bytes);
        if !matches!(self.spare, Spare::None) || with_spare > self.settings.max_bytes {
            return;
        }
        let (dir, bytes) = (self.dir.clone(), self.settings.segment_bytes);
        let thread = std::thread::Builder::new().name("ledger-spare".into());
        if let Ok(thread) = thread.spawn(move || segment::prepare(&dir, bytes)) {
            self.spare = Spare::Preparing(thread);
        }
    }

    /// Takes note of a spare segment that has become ready, or could not.
    fn look(&mut self) {
        if matches!(&self.spare, Spare::Preparing(thread) if thread.is_finished()) {
            self.wait();
        }
    }

    fn wait(&mut self) {
        self.spare = match std::mem::replace(&mut self.spare, Spare::None) {
            Spare::Preparing(thread) => match thread.join() {
                Ok(Ok(file)) => {
                    self.starved = false;
                    Spare::Ready(file)
                }
                Ok(Err(error)) => {
                    // Tried every second, and told once.
                    if !std::mem::replace(&mut self.starved, true) {
                        tracing::error!(%error, "the ledger gets no space for its next segment");
                    }
                    Spare::None
                }
                Err(_) => Spare::None,
            },
            other => other,
        };
    }

    /// Seals the segment and begins the next one.
    fn roll(&mut self) -> Result<(), LedgerError> {
        self.wait();
        if matches!(self.spare, Spare::None) {
            self.prepare();
            self.wait();
        }
        let Spare::Ready(file) = std::mem::replace(&mut self.spare, Spare::None) else {
            return Err(LedgerError::Full {
                disk_bytes: self.disk_bytes(),
                max_bytes: self.settings.max_bytes,
            });
        };
        let header = SegmentHeader {
            number: self.segment + 1,
            first_sequence: self.sequence + 1,
            chain: self.chain,
            previous: self.segment,
            previous_end: self.end,
        };
        self.begin(file, &header).map_err(|error| self.fail(&error))?;
        self.prepare();
        Ok(())
    }

    fn begin(&mut self, file: File, header: &SegmentHeader) -> io::Result<()> {
        self.hooks.at("log.roll")?;
        segment::begin(&self.dir, &file, header)?;
        self.hooks.at("log.rolled")?;
        // Nothing more comes; what is behind the last record would only raise questions.
        self.file.set_len(self.end)?;
        (self.file, self.segment, self.end) = (file, header.number, RECORDS_START);
        self.segments += 1;
        Ok(())
    }

    fn fail(&mut self, error: &io::Error) -> LedgerError {
        self.failed = true;
        tracing::error!(
            %error, segment = self.segment, offset = self.end,
            "the ledger could not be written: billable work stops until the node is started again"
        );
        LedgerError::Failed
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.sync_head();
        // A thread that still writes into the folder must not outlive who has it.
        self.wait();
    }
}
