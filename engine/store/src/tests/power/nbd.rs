//! A drive with a volatile cache, served over NBD (the protocol of nbd's `doc/proto.md`) on a Unix socket.
//!
//! Everything is in memory. A write is in the cache until a flush, or at once on the medium if it says so (FUA).
//! [`Drive::cut`] keeps a random half of the cached sectors and answers nobody any more, until it is served again.

use std::collections::HashSet;
use std::io::{Read, Result, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::io::sim::{Random, SECTOR};

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Has flags, takes flushes, takes FUA.
const TRANSMISSION_FLAGS: u16 = 1 | 1 << 2 | 1 << 3;
const EINVAL: u32 = 22;

/// See the module.
pub(super) struct Drive(Mutex<State>);

struct State {
    /// What a read sees.
    live: Vec<u8>,
    /// What survives.
    medium: Vec<u8>,
    cached: HashSet<usize>,
    /// Counts cuts: connections of an earlier time are answered no more.
    life: u64,
}

impl Drive {
    pub(super) fn new(content: Vec<u8>) -> Self {
        Self(Mutex::new(State { live: content.clone(), medium: content, cached: HashSet::new(), life: 0 }))
    }

    /// Takes connections on a socket until the next cut.
    pub(super) fn serve(self: &Arc<Self>, socket: &Path) -> Result<()> {
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket)?;
        let (drive, life) = (Arc::clone(self), self.state().life);
        std::thread::spawn(move || {
            // One connection: nothing is said of several being coherent.
            let Ok((stream, _)) = listener.accept() else { return };
            let _ = Connection { drive: &drive, life, stream }.run();
        });
        Ok(())
    }

    /// Ends the power. How many sectors were forgotten.
    pub(super) fn cut(&self, seed: u64) -> u64 {
        let mut state = self.state();
        state.life += 1;
        let State { live, medium, cached, .. } = &mut *state;
        let mut random = Random::new(seed);
        let mut sectors: Vec<usize> = cached.drain().collect();
        sectors.sort_unstable();
        let mut forgotten = 0;
        for sector in sectors {
            let bytes = sector * SECTOR..(sector + 1) * SECTOR;
            if random.once_in(2) {
                medium[bytes.clone()].copy_from_slice(&live[bytes]);
            } else {
                forgotten += 1;
            }
        }
        live.copy_from_slice(medium);
        forgotten
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn write(&mut self, offset: usize, data: &[u8]) {
        self.live[offset..offset + data.len()].copy_from_slice(data);
        self.cached.extend(offset / SECTOR..(offset + data.len()).div_ceil(SECTOR));
    }

    fn flush(&mut self, sectors: impl Iterator<Item = usize>) {
        for sector in sectors {
            self.cached.remove(&sector);
            let bytes = sector * SECTOR..(sector + 1) * SECTOR;
            self.medium[bytes.clone()].copy_from_slice(&self.live[bytes]);
        }
    }
}

struct Connection<'a> {
    drive: &'a Drive,
    life: u64,
    stream: UnixStream,
}

impl Connection<'_> {
    fn run(&mut self) -> Result<()> {
        self.stream.write_all(b"NBDMAGICIHAVEOPT")?;
        // Fixed newstyle, no zeros.
        self.stream.write_all(&3_u16.to_be_bytes())?;
        let no_zeroes = self.u32()? & 2 != 0;
        while let Some(option) = self.option()? {
            match option {
                // Export name: the answer has no frame.
                1 => {
                    let info = self.info();
                    self.stream.write_all(&info[2..])?;
                    if !no_zeroes {
                        self.stream.write_all(&[0; 124])?;
                    }
                    return self.transmit();
                }
                6 | 7 => {
                    let info = self.info();
                    self.reply(option, 3, &info)?;
                    self.reply(option, 1, &[])?;
                    if option == 7 {
                        return self.transmit();
                    }
                }
                2 => return self.reply(option, 1, &[]),
                _ => self.reply(option, 1 << 31 | 1, &[])?,
            }
        }
        Ok(())
    }

    /// Type 0 (export), size, flags.
    fn info(&self) -> Vec<u8> {
        let size = self.drive.state().live.len() as u64;
        [&[0, 0][..], &size.to_be_bytes(), &TRANSMISSION_FLAGS.to_be_bytes()].concat()
    }

    fn option(&mut self) -> Result<Option<u32>> {
        if self.u64()? != OPTION_MAGIC {
            return Ok(None);
        }
        let (option, len) = (self.u32()?, self.u32()?);
        let mut data = vec![0; len.min(1 << 16) as usize];
        self.stream.read_exact(&mut data)?;
        Ok(Some(option))
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> Result<()> {
        let len = u32::try_from(data.len()).unwrap();
        let head = [&option.to_be_bytes()[..], &kind.to_be_bytes(), &len.to_be_bytes()].concat();
        self.stream.write_all(&[&REPLY_MAGIC.to_be_bytes()[..], &head, data].concat())
    }

    fn transmit(&mut self) -> Result<()> {
        loop {
            if self.u32()? != REQUEST_MAGIC {
                return Ok(());
            }
            let flags_and_kind = self.u32()?;
            let (fua, kind) = (flags_and_kind >> 16 & 1 != 0, flags_and_kind & 0xffff);
            let (cookie, offset, len) = (self.u64()?, self.u64()?, self.u32()? as usize);
            let offset = usize::try_from(offset).unwrap();
            let mut data = Vec::new();
            if kind == 1 {
                data.resize(len, 0);
                self.stream.read_exact(&mut data)?;
            }
            let mut error = 0;
            {
                let mut state = self.drive.state();
                if state.life != self.life {
                    return Ok(());
                }
                let sectors = offset / SECTOR..(offset + len).div_ceil(SECTOR);
                match kind {
                    0 => data.extend_from_slice(&state.live[offset..offset + len]),
                    1 => {
                        state.write(offset, &data);
                        if fua {
                            state.flush(sectors);
                        }
                        data.clear();
                    }
                    2 => return Ok(()),
                    3 => {
                        let all: Vec<usize> = state.cached.iter().copied().collect();
                        state.flush(all.into_iter());
                    }
                    _ => error = EINVAL,
                }
            }
            let head =
                [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes()].concat();
            self.stream.write_all(&[&head, &data[..]].concat())?;
        }
    }

    fn u32(&mut self) -> Result<u32> {
        let mut bytes = [0; 4];
        self.stream.read_exact(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn u64(&mut self) -> Result<u64> {
        let mut bytes = [0; 8];
        self.stream.read_exact(&mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }
}
