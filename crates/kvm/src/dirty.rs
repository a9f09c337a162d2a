//! The dirty log: KVM's rings where it has them, else its bitmaps (api.rst §8.29, §4.8, §4.117).
//!
//! What a companion engine executes is in its own log, which goes along with this one.
use crate::error::refused;
use crate::memory::MappedVm;
use crate::raw;
use crate::ring::Ring;
use crate::vm::VmShared;
use crate::{DirtyLogMeans, Virtualisation, host};
use arch::GuestPhysical;
use arch::address::PAGE_SIZE;
use engine::{DirtyLog, DirtyMap, DirtyRange, EngineError, Vm};
use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_dirty_gfn, kvm_enable_cap,
};
use kvm_ioctls::{Kvm, VcpuFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of a vCPU's ring: 4,096 pages. It is the kernel's memory, which a vCPU takes whether or
/// not its log is ever started, and 4 µs of its making.
const RING: u32 = 4096 * size_of::<kvm_dirty_gfn>() as u32;

/// How KVM keeps the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// In a ring of so many bytes for each vCPU.
    Rings(u32),
    /// In a bitmap for each slot.
    Bitmaps {
        /// Bitmaps are read and cleared separately, which keeps KVM's lock shorter.
        manual: bool,
    },
}

impl Means {
    /// Chooses, before there are vCPUs.
    ///
    /// # Errors
    /// KVM refuses what it offers.
    pub fn choose(kvm: &Kvm, mapped: &MappedVm, wish: DirtyLogMeans) -> Result<Self, EngineError> {
        let rings = match wish {
            DirtyLogMeans::Auto => host::virtualisation() != Virtualisation::None,
            DirtyLogMeans::Rings => true,
            DirtyLogMeans::Bitmaps => false,
        };
        let offered = |cap: u32| kvm.check_extension_raw(cap.into());
        for cap in [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING] {
            let most = u32::try_from(offered(cap)).unwrap_or(0);
            if rings && most >= RING {
                let mut enable = kvm_enable_cap { cap, ..Default::default() };
                enable.args[0] = RING.into();
                mapped.fd.enable_cap(&enable).map_err(refused(
                    "KVM does not give vCPUs dirty rings (KVM_CAP_DIRTY_LOG_RING)",
                ))?;
                return Ok(Self::Rings(RING));
            }
        }
        let manual = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
        let manual = offered(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) as u32 & manual != 0;
        if manual {
            let cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
            let mut enable = kvm_enable_cap { cap, ..Default::default() };
            enable.args[0] = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.into();
            mapped
                .fd
                .enable_cap(&enable)
                .map_err(refused("KVM does not enable KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"))?;
        }
        Ok(Self::Bitmaps { manual })
    }
}

/// The log of a VM.
pub struct Log {
    means: Means,
    parts: Mutex<Parts>,
}

#[derive(Default)]
struct Parts {
    /// What was collected; `None` while the log is off.
    map: Option<DirtyMap>,
    rings: Vec<Ring>,
    companions: Vec<Arc<dyn Vm>>,
}

impl Log {
    /// A log that is off.
    pub fn new(means: Means) -> Self {
        Self { means, parts: Mutex::default() }
    }

    /// A panic leaves at worst collected pages in the map.
    fn lock(&self) -> MutexGuard<'_, Parts> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A vCPU was made.
    ///
    /// # Errors
    /// Its ring cannot be mapped.
    pub fn add_vcpu(&self, vcpu: &VcpuFd) -> Result<(), EngineError> {
        if let Means::Rings(bytes) = self.means {
            self.lock().rings.push(Ring::map(vcpu, bytes)?);
        }
        Ok(())
    }

    /// A companion engine has a VM of the same memory.
    ///
    /// # Errors
    /// The log is on, and the companion has none.
    pub fn add_companion(&self, vm: Arc<dyn Vm>) -> Result<(), EngineError> {
        let mut parts = self.lock();
        if parts.map.is_some() {
            log_of(&vm)?.start()?;
        }
        parts.companions.push(vm);
        Ok(())
    }
}

fn log_of(companion: &Arc<dyn Vm>) -> Result<&dyn DirtyLog, EngineError> {
    companion.dirty_log().ok_or_else(|| {
        EngineError::Unsupported(
            "the engine that executes what KVM cannot has no dirty log".to_owned(),
        )
    })
}

impl VmShared {
    /// A vCPU's ring is full: makes room in all.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn empty_dirty_rings(&self) -> Result<(), EngineError> {
        self.collect_rings(&mut self.dirty.lock())
    }

    fn collect_rings(&self, parts: &mut Parts) -> Result<(), EngineError> {
        let Parts { map, rings, .. } = parts;
        let mut whole = true;
        for ring in rings {
            whole &= ring.collect(|slot, page| {
                if let Some(map) = map
                    && let Some(start) = self.mapped.slot_start(slot)
                {
                    map.mark(GuestPhysical(start.saturating_add(page.saturating_mul(PAGE_SIZE))));
                }
            });
        }
        if !whole {
            return Err(EngineError::Unsupported(
                "KVM has overrun a vCPU's dirty ring (KVM_CAP_DIRTY_LOG_RING), and the log is not \
                 complete; keep it in bitmaps"
                    .into(),
            ));
        }
        raw::reset_dirty_rings(&self.mapped.fd)
            .map_err(refused("KVM does not take dirty rings back (KVM_RESET_DIRTY_RINGS)"))
    }

    fn collect_bitmaps(&self, map: &DirtyMap, manual: bool) -> Result<(), EngineError> {
        let fd = &self.mapped.fd;
        for slot in self.mapped.writable() {
            let bitmap = fd
                .get_dirty_log(slot.slot, slot.memory_size as usize)
                .map_err(refused("KVM does not give its dirty log (KVM_GET_DIRTY_LOG)"))?;
            map.mark_bits(GuestPhysical(slot.guest_phys_addr), &bitmap);
            if manual {
                let pages = u32::try_from(slot.memory_size / PAGE_SIZE).unwrap_or(u32::MAX);
                raw::clear_dirty_log(fd, slot.slot, pages, &bitmap)
                    .map_err(refused("KVM does not clear its dirty log (KVM_CLEAR_DIRTY_LOG)"))?;
            }
        }
        Ok(())
    }

    fn collect(&self, parts: &mut Parts) -> Result<(), EngineError> {
        match (self.dirty.means, &parts.map) {
            (Means::Rings(_), _) => self.collect_rings(parts),
            (Means::Bitmaps { manual }, Some(map)) => self.collect_bitmaps(map, manual),
            (Means::Bitmaps { .. }, None) => Ok(()),
        }
    }
}

impl DirtyLog for VmShared {
    fn start(&self) -> Result<(), EngineError> {
        let mut parts = self.dirty.lock();
        for companion in &parts.companions {
            log_of(companion)?.start()?;
        }
        self.mapped.set_logging(true)?;
        // What is left of a log before.
        self.collect(&mut parts)?;
        parts.map = Some(DirtyMap::new(&self.config.memory));
        Ok(())
    }

    fn harvest(&self) -> Result<Vec<DirtyRange>, EngineError> {
        let mut parts = self.dirty.lock();
        if parts.map.is_none() {
            return Err(EngineError::Unsupported("the dirty log was not started".into()));
        }
        self.collect(&mut parts)?;
        let Parts { map: Some(map), companions, .. } = &*parts else { return Ok(Vec::new()) };
        for companion in companions {
            map.mark_ranges(&log_of(companion)?.harvest()?);
        }
        Ok(map.take())
    }

    fn stop(&self) -> Result<(), EngineError> {
        let mut parts = self.dirty.lock();
        if parts.map.is_none() {
            return Ok(());
        }
        self.mapped.set_logging(false)?;
        parts.map = None;
        for companion in &parts.companions {
            log_of(companion)?.stop()?;
        }
        self.collect(&mut parts)
    }
}
