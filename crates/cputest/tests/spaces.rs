//! Address spaces with and without identifiers: what must be forgotten when, and that nothing of
//! one space is seen in another (Intel SDM 3A 4.10).
// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use arch::registers::{cr4, rflags};
use cputest::layout::{PageTables, Paging, page, write_u64};
use cputest::micro::{Guest, Mode, at, done, say, sel};
use cputest::on_each_engine;
use cputest::under_test::EngineUnderTest;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// The page that is another one in each space.
const LINEAR: u64 = 0x70_0000;
/// Where data is in it; code is at its start.
const OFFSET: u64 = 0x800;
/// Descriptors of INVPCID.
const INVPCID: u64 = at::DATA + 0xf000;
/// User code that calls the page and comes back by an interrupt.
const GATE: u8 = 0x50;

/// A guest with several address spaces, all of them mapping RAM where it is.
struct Spaces {
    guest: Guest,
    tables: Vec<PageTables>,
}

fn frame(n: usize) -> u64 {
    at::DATA + 0x1000 * n as u64
}

/// Code that returns `value`, and the same value as data, into a frame.
fn fill(guest: &Guest, n: usize, value: u32) {
    guest.code(frame(n), |a| {
        a.mov(eax, value)?;
        a.ret()
    });
    write_u64(&guest.memory, frame(n) + OFFSET, value.into());
}

impl Spaces {
    /// Space `n` maps [`LINEAR`] to frame `n`, which holds `100 + n`; its identifier is `n + 1`.
    fn new(engine: EngineUnderTest, count: usize) -> Self {
        let mut guest = Guest::new(engine, Mode::LONG);
        let memory = guest.memory.clone();
        let mut tables = Vec::new();
        for n in 0..count {
            let mut table = PageTables::new(Paging::Four, 0x30_0000 + 0x8000 * n as u64);
            for address in (0..at::RAM).step_by(0x1000) {
                let user = if address >> 20 == 1 { page::U } else { page::G };
                table.map(&memory, address, address, page::P | page::W | user);
            }
            table.map(&memory, LINEAR, frame(n), page::P | page::W | page::U);
            fill(&guest, n, 100 + n as u32);
            tables.push(table);
        }
        guest.state.cr4 |= cr4::PCIDE | cr4::PGE;
        guest.state.cr3 = tables[0].root() | 1;
        guest.handler(GATE, 0x9000, 3);
        guest.code(0x9000, |a| {
            a.mov(eax, r12d)?;
            say(a)?;
            a.add(rsp, 40)?;
            a.jmp(r13)
        });
        guest.code(at::USER, |a| {
            a.mov(ebx, LINEAR as u32)?;
            a.call(rbx)?;
            a.mov(r12d, eax)?;
            a.int(i32::from(GATE))
        });
        Self { guest, tables }
    }

    /// What CR3 holds in space `n`, with the bit that keeps translations or without it.
    fn root(&self, n: usize, keep: bool) -> u64 {
        self.tables[n].root() | (n as u64 + 1) | u64::from(keep) << 63
    }

    /// Physical, and here linear, address of the entry that maps [`LINEAR`] in space `n`.
    fn entry(&mut self, n: usize) -> u64 {
        self.tables[n].entry(&self.guest.memory.clone(), LINEAR, 1)
    }
}

fn go(a: &mut CodeAssembler, root: u64) -> Result<(), IcedError> {
    a.mov(rax, root)?;
    a.mov(cr3, rax)
}

/// Says what the page holds: by a direct call, an indirect one, a load, and a call of user code.
fn visit(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.call(LINEAR)?;
    say(a)?;
    a.mov(ebx, LINEAR as u32)?;
    a.call(rbx)?;
    say(a)?;
    a.mov(eax, dword_ptr(LINEAR + OFFSET))?;
    say(a)?;
    let mut back = a.create_label();
    a.lea(r13, ptr(back))?;
    for value in [i32::from(sel::USER_DATA), at::USER_STACK as i32, rflags::FIXED as i32] {
        a.push(value)?;
    }
    a.push(i32::from(sel::USER_CODE64))?;
    a.push(at::USER as i32)?;
    a.iretq()?;
    a.set_label(&mut back)
}

fn remap(a: &mut CodeAssembler, entry: u64, n: usize) -> Result<(), IcedError> {
    a.mov(rax, frame(n) | page::P | page::W | page::U)?;
    a.mov(qword_ptr(entry), rax)
}

fn four(values: &[u32]) -> Vec<u32> {
    values.iter().flat_map(|v| [*v; 4]).collect()
}

on_each_engine!(each_space_sees_its_own_page_however_often_they_alternate, |engine| {
    let count = 12;
    let mut spaces = Spaces::new(engine, count);
    let order: Vec<usize> = (0..150).map(|n: usize| (n * n + n / 7) % count).collect();
    let roots: Vec<u64> = order.iter().map(|&n| spaces.root(n, true)).collect();
    spaces.guest.code(at::CODE, |a| {
        // The code of this test is longer than a page: it may lie in what a test calls RAM.
        a.jmp(0x20_0000)
    });
    spaces.guest.code(0x20_0000, |a| {
        for root in &roots {
            go(a, *root)?;
            visit(a)?;
        }
        done(a)
    });
    let expected: Vec<u32> = order.iter().map(|&n| 100 + n as u32).collect();
    assert_eq!(spaces.guest.run().done(), four(&expected));
});

on_each_engine!(a_write_to_cr3_without_the_keep_bit_forgets_the_space_it_goes_to, |engine| {
    let mut spaces = Spaces::new(engine, 3);
    let entry = spaces.entry(0);
    let (other, back) = (spaces.root(1, true), spaces.root(0, false));
    spaces.guest.code(at::CODE, |a| {
        visit(a)?;
        go(a, other)?;
        visit(a)?;
        remap(a, entry, 2)?;
        go(a, back)?;
        visit(a)?;
        remap(a, entry, 1)?;
        go(a, back)?;
        visit(a)?;
        done(a)
    });
    assert_eq!(spaces.guest.run().done(), four(&[100, 101, 102, 101]));
});

on_each_engine!(an_identifier_given_to_another_space_brings_nothing_of_the_first, |engine| {
    let mut spaces = Spaces::new(engine, 3);
    let first = spaces.root(0, false);
    let (second, third) = (spaces.tables[1].root() | 1, spaces.tables[2].root() | 1);
    spaces.guest.code(at::CODE, |a| {
        for root in [first, second, third, first] {
            go(a, root)?;
            visit(a)?;
        }
        done(a)
    });
    assert_eq!(spaces.guest.run().done(), four(&[100, 101, 102, 100]));
});

on_each_engine!(without_identifiers_every_write_to_cr3_forgets_all_but_global_pages, |engine| {
    let mut spaces = Spaces::new(engine, 3);
    spaces.guest.state.cr4 &= !cr4::PCIDE;
    spaces.guest.state.cr3 = spaces.tables[0].root();
    let entry = spaces.entry(0);
    let (first, second) = (spaces.tables[0].root(), spaces.tables[1].root());
    spaces.guest.code(at::CODE, |a| {
        visit(a)?;
        remap(a, entry, 2)?;
        go(a, second)?;
        visit(a)?;
        go(a, first)?;
        visit(a)?;
        done(a)
    });
    assert_eq!(spaces.guest.run().done(), four(&[100, 101, 102]));
});

on_each_engine!(every_form_of_invpcid_reaches_a_space_that_is_not_the_present_one, |engine| {
    for form in 0..4u32 {
        let mut spaces = Spaces::new(engine, 3);
        let entry = spaces.entry(0);
        let (other, back) = (spaces.root(1, true), spaces.root(0, true));
        write_u64(&spaces.guest.memory, INVPCID, 1);
        write_u64(&spaces.guest.memory, INVPCID + 8, LINEAR);
        spaces.guest.code(at::CODE, |a| {
            for n in [2, 1, 0] {
                visit(a)?;
                go(a, other)?;
                visit(a)?;
                remap(a, entry, n)?;
                a.mov(ecx, form)?;
                a.invpcid(rcx, xmmword_ptr(INVPCID))?;
                go(a, back)?;
            }
            visit(a)?;
            done(a)
        });
        let expected = four(&[100, 101, 102, 101, 101, 101, 100]);
        assert_eq!(spaces.guest.run().done(), expected, "form {form}");
    }
});

on_each_engine!(every_form_of_invpcid_reaches_the_present_space, |engine| {
    for form in 0..4u32 {
        let mut spaces = Spaces::new(engine, 3);
        let entry = spaces.entry(0);
        write_u64(&spaces.guest.memory, INVPCID, 1);
        write_u64(&spaces.guest.memory, INVPCID + 8, LINEAR);
        spaces.guest.code(at::CODE, |a| {
            visit(a)?;
            remap(a, entry, 2)?;
            a.mov(ecx, form)?;
            a.invpcid(rcx, xmmword_ptr(INVPCID))?;
            visit(a)?;
            done(a)
        });
        assert_eq!(spaces.guest.run().done(), four(&[100, 102]), "form {form}");
    }
});

on_each_engine!(invpcid_refuses_forms_identifiers_and_addresses_that_do_not_exist, |engine| {
    let refused = [(4u32, 1u64, LINEAR), (0, 1 << 12, LINEAR), (1, 1 << 20, 0), (0, 1, 1 << 63)];
    for (form, pcid, address) in refused {
        let spaces = &mut Spaces::new(engine, 1);
        write_u64(&spaces.guest.memory, INVPCID, pcid);
        write_u64(&spaces.guest.memory, INVPCID + 8, address);
        spaces.guest.code(at::CODE, |a| {
            a.mov(ecx, form)?;
            a.invpcid(rcx, xmmword_ptr(INVPCID))
        });
        let exception = spaces.guest.run().exception();
        assert_eq!((exception.vector, exception.error), (13, Some(0)), "form {form}");
    }
});

on_each_engine!(code_rewritten_in_another_space_is_new_on_return, |engine| {
    let mut spaces = Spaces::new(engine, 2);
    let (other, back) = (spaces.root(1, true), spaces.root(0, true));
    spaces.guest.code(at::CODE, |a| {
        for value in [200, 201, 202] {
            visit(a)?;
            go(a, other)?;
            visit(a)?;
            // The immediate of the MOV, and the data.
            a.mov(dword_ptr(frame(0) + 1), value)?;
            a.mov(dword_ptr(frame(0) + OFFSET), value)?;
            go(a, back)?;
        }
        visit(a)?;
        done(a)
    });
    assert_eq!(spaces.guest.run().done(), four(&[100, 101, 200, 101, 201, 101, 202]));
});

on_each_engine!(invlpg_forgets_a_large_page_as_a_whole, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    let memory = guest.memory.clone();
    let large = 0x80_0000;
    guest.tables.map_large(&memory, large, 0, page::P | page::W);
    let entry = guest.tables.entry(&memory, large, 2);
    for (n, address) in [at::DATA, at::DATA + 0x3000].into_iter().enumerate() {
        write_u64(&memory, address, n as u64 + 1);
        write_u64(&memory, address + 0x20_0000, n as u64 + 11);
    }
    guest.code(at::CODE, |a| {
        for _ in 0..2 {
            for address in [at::DATA, at::DATA + 0x3000] {
                a.mov(eax, dword_ptr(large + address))?;
                say(a)?;
            }
            a.mov(rax, 0x20_0000 | page::P | page::W | page::LARGE)?;
            a.mov(qword_ptr(entry), rax)?;
            a.invlpg(byte_ptr(large + 0x1000))?;
        }
        done(a)
    });
    assert_eq!(guest.run().done(), [1, 2, 11, 12]);
});

on_each_engine!(global_pages_are_forgotten_by_invlpg_and_by_turning_them_off, |engine| {
    for invlpg in [true, false] {
        let mut spaces = Spaces::new(engine, 3);
        let memory = spaces.guest.memory.clone();
        let global = page::P | page::W | page::U | page::G;
        spaces.tables[0].map(&memory, LINEAR, frame(0), global);
        let entry = spaces.entry(0);
        spaces.guest.code(at::CODE, |a| {
            visit(a)?;
            a.mov(rax, frame(2) | global)?;
            a.mov(qword_ptr(entry), rax)?;
            if invlpg {
                a.invlpg(byte_ptr(LINEAR))?;
            } else {
                a.mov(rax, cr4)?;
                a.btr(rax, 7)?;
                a.mov(cr4, rax)?;
                a.bts(rax, 7)?;
                a.mov(cr4, rax)?;
            }
            visit(a)?;
            done(a)
        });
        assert_eq!(spaces.guest.run().done(), four(&[100, 102]), "invlpg {invlpg}");
    }
});

on_each_engine!(code_at_more_pages_than_any_table_holds_still_follows_its_pages, |engine| {
    let mut guest = Guest::new(engine, Mode::LONG);
    let memory = guest.memory.clone();
    let (base, count) = (0x4000_0000u64, u64::from(engine.rounds(70_000)));
    guest.tables = PageTables::new(Paging::Four, 0x30_0000);
    for address in (0..at::RAM).step_by(0x1000) {
        guest.tables.map(&memory, address, address, page::P | page::W);
    }
    guest.state.cr3 = guest.tables.root();
    for n in 0..count {
        guest.tables.map(&memory, base + 0x1000 * n, frame(0), page::P);
    }
    for (n, step) in [1u32, 1000].into_iter().enumerate() {
        guest.code(frame(n), |a| {
            a.add(eax, step as i32)?;
            a.ret()
        });
    }
    let entry = guest.tables.entry(&memory, base, 1);
    guest.code(at::CODE, |a| {
        let mut again = a.create_label();
        a.xor(eax, eax)?;
        a.mov(ecx, count as u32)?;
        a.mov(rbx, base)?;
        a.set_label(&mut again)?;
        a.call(rbx)?;
        a.add(rbx, 0x1000)?;
        a.dec(ecx)?;
        a.jne(again)?;
        say(a)?;
        a.mov(rbx, base)?;
        a.xor(eax, eax)?;
        a.call(rbx)?;
        say(a)?;
        a.mov(rdx, frame(1) | page::P)?;
        a.mov(qword_ptr(entry), rdx)?;
        a.invlpg(byte_ptr(rbx))?;
        a.xor(eax, eax)?;
        a.call(rbx)?;
        say(a)?;
        done(a)
    });
    assert_eq!(guest.run().done(), [count as u32, 1, 1000]);
});
