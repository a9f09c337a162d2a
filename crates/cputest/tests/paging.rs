//! Paging modes, permissions, accessed and dirty bits, and the TLB (Intel SDM 3A 4).
use arch::registers::{cr0, cr4, rflags};
use cputest::layout::{PageTables, Paging, page, write_u64};
use cputest::micro::{Guest, Mode, Stop, at, done, say};
use cputest::on_each_engine;
use iced_x86::code_asm::*;

const LINEAR: u64 = 0x70_0000;
const MODES: [Mode; 4] = [
    Mode::Paged(Paging::Pae),
    Mode::Paged(Paging::Bits32),
    Mode::Long(Paging::Four),
    Mode::Long(Paging::Five),
];

fn map(guest: &mut Guest, linear: u64, physical: u64, bits: u64) {
    let memory = guest.memory.clone();
    guest.tables.map(&memory, linear, physical, bits);
}
fn leaf(guest: &mut Guest, linear: u64) -> u64 {
    let memory = guest.memory.clone();
    guest.tables.leaf(&memory, linear)
}

on_each_engine!(every_paging_mode_translates_small_and_large_pages, |engine| {
    for mode in MODES {
        let mut guest = Guest::new(engine, mode);
        let memory = guest.memory.clone();
        map(&mut guest, LINEAR, at::DATA, page::P | page::W);
        map(&mut guest, LINEAR + 0x1000, at::DATA + 0x5000, page::P | page::W);
        // The frame at 0 as a large page: the code's own page appears in it.
        guest.tables.map_large(&memory, 0x80_0000, 0, page::P | page::W);
        write_u64(&memory, at::DATA + 0xffc, 0x1111_1111);
        write_u64(&memory, at::DATA + 0x5000, 0x2222_2222);
        write_u64(&memory, at::DATA + 0x8, 0x3333_3333);
        guest.code(at::CODE, |a| {
            a.mov(eax, dword_ptr(LINEAR + 0xffc))?;
            say(a)?;
            a.mov(eax, dword_ptr(LINEAR + 0xffe))?;
            say(a)?;
            a.mov(eax, dword_ptr(0x80_0000 + at::DATA + 8))?;
            say(a)?;
            done(a)
        });
        assert_eq!(guest.run().done(), [0x1111_1111, 0x2222_1111, 0x3333_3333], "{mode:?}");
    }
});

on_each_engine!(five_levels_reach_addresses_beyond_48_bits, |engine| {
    let mut guest = Guest::new(engine, Mode::Long(Paging::Five));
    map(&mut guest, 0x00ff_0000_0000_0000, at::DATA, page::P | page::W);
    guest.code(at::CODE, |a| {
        a.mov(rbx, 0x00ff_0000_0000_0000u64)?;
        a.mov(dword_ptr(rbx), 77)?;
        a.mov(eax, dword_ptr(at::DATA))?;
        say(a)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [77]);
});

/// What an access of a kind gives: nothing, or the error code of the page fault.
struct Rule {
    user_page: bool,
    writable: bool,
    executable: bool,
    cr4: u64,
    wp: bool,
    ac: bool,
}

impl Rule {
    fn read(&self, user: bool) -> Option<u32> {
        let smap = self.cr4 & cr4::SMAP != 0 && !self.ac;
        let denied = if user { !self.user_page } else { self.user_page && smap };
        denied.then_some(1 | u32::from(user) << 2)
    }
    fn write(&self, user: bool) -> Option<u32> {
        let read_only = !self.writable && (user || self.wp);
        let denied = self.read(user).is_some() || read_only;
        denied.then_some(3 | u32::from(user) << 2)
    }
    fn execute(&self, user: bool) -> Option<u32> {
        let smep = self.cr4 & cr4::SMEP != 0;
        let denied = if user { !self.user_page } else { self.user_page && smep };
        (denied || !self.executable).then_some(0x11 | u32::from(user) << 2)
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Read,
    Write,
    Execute,
}

/// One cell of the matrix: sets the page up, makes the access, compares fault and A/D bits.
fn check(guest: &mut Guest, linear: u64, rule: &Rule, kind: Kind, user: bool) {
    let bits = page::P
        | if rule.user_page { page::U } else { 0 }
        | if rule.writable { page::W } else { 0 }
        | if rule.executable { 0 } else { page::NX };
    map(guest, linear, at::DATA, bits);
    guest.state.cr4 = guest.state.cr4 & !(cr4::SMEP | cr4::SMAP) | rule.cr4;
    guest.state.cr0 = guest.state.cr0 & !cr0::WP | if rule.wp { cr0::WP } else { 0 };
    let state = guest.state.clone();
    let start = if user {
        guest.start_in_user_mode();
        at::USER
    } else {
        at::CODE
    };
    guest.state.rflags = rflags::FIXED | if rule.ac { rflags::AC } else { 0 };
    guest.code(start, |a| {
        a.mov(ebx, linear as u32)?;
        match kind {
            Kind::Read => a.mov(eax, dword_ptr(rbx))?,
            Kind::Write => a.mov(dword_ptr(rbx), 1)?,
            Kind::Execute => a.jmp(rbx)?,
        }
        a.ud2()
    });
    write_u64(&guest.memory, at::DATA, 0x0b0f);
    let end = guest.run();
    guest.state = state;
    let expected = match kind {
        Kind::Read => rule.read(user),
        Kind::Write => rule.write(user),
        Kind::Execute => rule.execute(user),
    };
    let told = format!(
        "{kind:?} by {} of page U{} W{} X{}, cr4 {:#x} wp {} ac {}",
        if user { "user" } else { "supervisor" },
        rule.user_page,
        rule.writable,
        rule.executable,
        rule.cr4,
        rule.wp,
        rule.ac
    );
    let exception = end.exception();
    match expected {
        None => assert_eq!(exception.vector, 6, "{told}: {exception:x?}"),
        Some(error) => {
            assert_eq!((exception.vector, exception.error), (14, Some(error)), "{told}");
            assert_eq!(end.state.cr2, linear, "{told}");
        }
    }
    let set = leaf(guest, linear) & (page::A | page::D);
    let wanted = match (expected, kind) {
        (Some(_), _) => 0,
        (None, Kind::Write) => page::A | page::D,
        (None, _) => page::A,
    };
    // A refused access may or may not have set A, but never D.
    if expected.is_none() {
        assert_eq!(set, wanted, "accessed and dirty bits: {told}");
    } else {
        assert_eq!(set & page::D, 0, "dirty bit: {told}");
    }
}

on_each_engine!(permissions_follow_user_write_execute_wp_smep_and_smap, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    // Each cell has a page of its own, so that no translation is left over from the last.
    let mut linear = LINEAR;
    for bits in 0..128u32 {
        let on = |n: u32| bits >> n & 1 != 0;
        let rule = Rule {
            user_page: on(0),
            writable: on(1),
            executable: on(2),
            cr4: if on(3) { cr4::SMEP } else { 0 } | if on(4) { cr4::SMAP } else { 0 },
            wp: on(5),
            ac: on(6),
        };
        for kind in [Kind::Read, Kind::Write, Kind::Execute] {
            for user in [false, true] {
                check(&mut guest, linear, &rule, kind, user);
                linear += 0x1000;
            }
        }
    }
});

on_each_engine!(permissions_of_all_levels_count, |engine| {
    for mode in [Mode::Paged(Paging::Bits32), Mode::Long(Paging::Four)] {
        let mut guest = Guest::new(engine, mode);
        let memory = guest.memory.clone();
        map(&mut guest, LINEAR, at::DATA, page::P | page::W | page::U);
        // The table above says read-only.
        let level = guest.tables.entry(&memory, LINEAR, 2);
        let table = cputest::layout::read_u32(&memory, level) & !(page::W as u32);
        cputest::layout::write(&memory, level, &table.to_le_bytes());
        // In 32-bit mode the first 4 MiB, which hold the code, have an entry of their own.
        guest.code(at::CODE, |a| a.mov(dword_ptr(LINEAR), 1));
        let exception = guest.run().exception();
        assert_eq!((exception.vector, exception.error), (14, Some(3)), "{mode:?}");
    }
});

on_each_engine!(stac_and_clac_open_and_close_user_pages, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.state.cr4 |= cr4::SMAP;
    write_u64(&guest.memory, at::USER, 5);
    guest.code(at::CODE, |a| {
        a.stac()?;
        a.mov(eax, dword_ptr(at::USER))?;
        say(a)?;
        a.clac()?;
        a.mov(eax, dword_ptr(at::USER))
    });
    let end = guest.run();
    assert_eq!(end.said, [5]);
    let exception = end.exception();
    assert_eq!((exception.vector, exception.error), (14, Some(1)));
});

on_each_engine!(a_read_sets_accessed_and_only_a_write_sets_dirty_even_after_the_read, |engine| {
    for mode in MODES {
        let mut guest = Guest::new(engine, mode);
        let memory = guest.memory.clone();
        map(&mut guest, LINEAR, at::DATA, page::P | page::W);
        let entry = guest.tables.entry(&memory, LINEAR, 1);
        guest.tables.map(&memory, 0x71_0000, entry & !0xfff, page::P);
        let visible = 0x71_0000 + (entry & 0xfff);
        guest.code(at::CODE, |a| {
            for access in 0..3 {
                match access {
                    0 => {}
                    1 => a.mov(ecx, dword_ptr(LINEAR))?,
                    _ => a.mov(dword_ptr(LINEAR), 1)?,
                }
                a.mov(eax, dword_ptr(visible))?;
                a.and(eax, 0x60)?;
                say(a)?;
            }
            done(a)
        });
        assert_eq!(guest.run().done(), [0, 0x20, 0x60], "{mode:?}");
    }
});

on_each_engine!(invlpg_and_a_reload_of_cr3_make_new_translations_visible, |engine| {
    for flush in ["invlpg", "cr3"] {
        let mut guest = Guest::new(engine, Mode::LONG);
        let memory = guest.memory.clone();
        map(&mut guest, LINEAR, at::DATA, page::P | page::W);
        let entry = guest.tables.entry(&memory, LINEAR, 1);
        guest.tables.map(&memory, 0x71_0000, entry & !0xfff, page::P | page::W);
        let visible = 0x71_0000 + (entry & 0xfff);
        write_u64(&memory, at::DATA, 1);
        write_u64(&memory, at::DATA + 0x1000, 2);
        guest.code(at::CODE, |a| {
            a.mov(eax, dword_ptr(LINEAR))?;
            say(a)?;
            a.mov(dword_ptr(visible), (at::DATA + 0x1000) as i32 | 3)?;
            if flush == "cr3" {
                a.mov(rax, cr3)?;
                a.mov(cr3, rax)?;
            } else {
                a.invlpg(byte_ptr(LINEAR))?;
            }
            a.mov(eax, dword_ptr(LINEAR))?;
            say(a)?;
            done(a)
        });
        assert_eq!(guest.run().done(), [1, 2], "{flush}");
    }
});

on_each_engine!(global_pages_are_forgotten_by_invlpg_and_by_a_change_of_pge, |engine| {
    for flush in ["invlpg", "pge"] {
        let mut guest = Guest::new(engine, Mode::LONG);
        let memory = guest.memory.clone();
        map(&mut guest, LINEAR, at::DATA, page::P | page::W | page::G);
        let entry = guest.tables.entry(&memory, LINEAR, 1);
        guest.tables.map(&memory, 0x71_0000, entry & !0xfff, page::P | page::W);
        let visible = 0x71_0000 + (entry & 0xfff);
        write_u64(&memory, at::DATA, 1);
        write_u64(&memory, at::DATA + 0x1000, 2);
        guest.code(at::CODE, |a| {
            a.mov(eax, dword_ptr(LINEAR))?;
            say(a)?;
            a.mov(dword_ptr(visible), (at::DATA + 0x1000) as i32 | 3)?;
            if flush == "pge" {
                a.mov(rax, cr4)?;
                a.btr(rax, 7)?;
                a.mov(cr4, rax)?;
                a.bts(rax, 7)?;
                a.mov(cr4, rax)?;
            } else {
                a.invlpg(byte_ptr(LINEAR))?;
            }
            a.mov(eax, dword_ptr(LINEAR))?;
            say(a)?;
            done(a)
        });
        assert_eq!(guest.run().done(), [1, 2], "{flush}");
    }
});

on_each_engine!(a_page_that_becomes_present_needs_no_flush, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    let memory = guest.memory.clone();
    map(&mut guest, LINEAR, 0, 0);
    let entry = guest.tables.entry(&memory, LINEAR, 1);
    guest.tables.map(&memory, 0x71_0000, entry & !0xfff, page::P | page::W);
    let visible = 0x71_0000 + (entry & 0xfff);
    write_u64(&memory, at::DATA, 9);
    guest.handler(14, 0x9000, 0);
    guest.code(0x9000, |a| {
        a.mov(dword_ptr(visible), at::DATA as i32 | 3)?;
        a.add(rsp, 8)?;
        a.iretq()
    });
    guest.code(at::CODE, |a| {
        a.mov(eax, dword_ptr(LINEAR))?;
        say(a)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [9]);
});

on_each_engine!(code_follows_its_page_when_the_page_is_remapped, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    let memory = guest.memory.clone();
    map(&mut guest, LINEAR, at::DATA, page::P | page::W);
    let entry = guest.tables.entry(&memory, LINEAR, 1);
    guest.tables.map(&memory, 0x71_0000, entry & !0xfff, page::P | page::W);
    let visible = 0x71_0000 + (entry & 0xfff);
    for (n, frame) in [at::DATA, at::DATA + 0x1000].into_iter().enumerate() {
        guest.code(frame, |a| {
            a.mov(eax, n as u32 + 1)?;
            a.ret()
        });
    }
    guest.code(at::CODE, |a| {
        a.mov(ebx, LINEAR as u32)?;
        a.call(rbx)?;
        say(a)?;
        a.mov(dword_ptr(visible), (at::DATA + 0x1000) as i32 | 3)?;
        a.invlpg(byte_ptr(LINEAR))?;
        a.call(rbx)?;
        say(a)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [1, 2]);
});

on_each_engine!(two_address_spaces_with_and_without_pcid_stay_apart, |engine| {
    for pcid in [false, true] {
        let mut guest = Guest::new(engine, Mode::LONG);
        let memory = guest.memory.clone();
        map(&mut guest, LINEAR, at::DATA, page::P | page::W);
        let mut other = PageTables::new(Paging::Four, 0x30_0000);
        for frame in (0..at::RAM).step_by(0x1000) {
            other.map(&memory, frame, frame, page::P | page::W);
        }
        other.map(&memory, LINEAR, at::DATA + 0x1000, page::P | page::W);
        write_u64(&memory, at::DATA, 1);
        write_u64(&memory, at::DATA + 0x1000, 2);
        let (first, second) = (guest.tables.root(), other.root());
        let (first, second) = if pcid { (first | 1, second | 2) } else { (first, second) };
        if pcid {
            guest.state.cr4 |= cr4::PCIDE;
            guest.state.cr3 = first;
        }
        guest.code(at::CODE, |a| {
            for keep in [0u64, 1 << 63] {
                for root in [first, second, first] {
                    a.mov(rax, root | if pcid { keep } else { 0 })?;
                    a.mov(cr3, rax)?;
                    a.mov(eax, dword_ptr(LINEAR))?;
                    say(a)?;
                }
            }
            done(a)
        });
        assert_eq!(guest.run().done(), [1, 2, 1, 1, 2, 1], "pcid {pcid}");
    }
});

on_each_engine!(
    changes_of_wp_smep_and_paging_bits_in_control_registers_take_effect_at_once,
    |engine| {
        let mut guest = Guest::new(engine, Mode::LONG);
        map(&mut guest, LINEAR, at::DATA, page::P);
        guest.state.cr0 &= !cr0::WP;
        guest.code(at::CODE, |a| {
            a.mov(dword_ptr(LINEAR), 3)?;
            a.mov(eax, dword_ptr(LINEAR))?;
            say(a)?;
            a.mov(rax, cr0)?;
            a.or(eax, cr0::WP as u32 as i32)?;
            a.mov(cr0, rax)?;
            a.mov(dword_ptr(LINEAR), 4)
        });
        let end = guest.run();
        assert_eq!(end.said, [3]);
        let exception = end.exception();
        assert_eq!((exception.vector, exception.error), (14, Some(3)));
    }
);

on_each_engine!(a_cr3_that_names_no_memory_shuts_the_cpu_down, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    guest.code(at::CODE, |a| {
        a.mov(rax, 0x30_0000i64)?;
        a.mov(cr3, rax)?;
        done(a)
    });
    assert_eq!(guest.run().stop, Stop::TripleFault);
});

on_each_engine!(device_registers_behind_paging_reach_the_machine_with_their_width, |engine| {
    use arch::GuestPhysical;
    use cputest::machine::Access;
    let mut guest = Guest::new(engine, Mode::LONG);
    map(&mut guest, LINEAR, 0xd000_0000, page::P | page::W);
    guest.code(at::CODE, |a| {
        a.mov(eax, 0x1122_3344)?;
        a.mov(dword_ptr(LINEAR + 4), eax)?;
        a.mov(byte_ptr(LINEAR + 8), al)?;
        a.movzx(eax, word_ptr(LINEAR + 2))?;
        say(a)?;
        a.add(dword_ptr(LINEAR + 16), 1)?;
        done(a)
    });
    let end = guest.run();
    assert_eq!(end.done(), [0xffff]);
    let log: Vec<_> =
        guest.io.log().into_iter().filter(|a| !matches!(a, Access::Out(..))).collect();
    let at = |n: u64| GuestPhysical(0xd000_0000 + n);
    let wanted = [
        Access::Write(at(4), 0x1122_3344),
        Access::Write(at(8), 0x44),
        Access::Read(at(2)),
        Access::Read(at(16)),
        Access::Write(at(16), 0),
    ];
    assert_eq!(log, wanted);
});
