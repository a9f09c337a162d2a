//! The tests that this host's KVM cannot pass, by name and with KVM's reason.
//!
//! The list is about KVM where neither VMX nor SVM is behind it, KVM on PVM: guest user code runs
//! natively, all other code by instruction emulation. What the emulator says that it does not
//! know, the software engine completes, and tests of that pass; here is what it does wrongly
//! without saying so. A test on the list must fail as its entry says, so that the list stays true.
use arch::{CpuModel, Feature};
use kvm::HostKvm;

/// Where a test cannot pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Where {
    /// On a KVM without hardware behind it.
    NoHardware,
    /// On a KVM that does not offer a feature.
    Without(Feature),
}

/// A test that cannot pass.
#[derive(Debug)]
pub struct Limit {
    test: &'static str,
    place: Where,
    /// What KVM does instead.
    pub reason: &'static str,
    /// What the failure's message contains.
    pub shows: &'static str,
}

const fn limit(test: &'static str, shows: &'static str, reason: &'static str) -> Limit {
    Limit { test, place: Where::NoHardware, reason, shows }
}

const fn without_pcid(test: &'static str) -> Limit {
    Limit {
        test,
        place: Where::Without(Feature::Pcid),
        reason: "it does not offer PCID",
        shows: "KVM does not take the control registers",
    }
}

const GATES: &str = "user code runs natively, where the guest's gates do not exist: #UD or #GP";
const PAGING: &str = "outside long mode, addresses are not translated";
const BREAKPOINTS: &str = "its emulator does not look at the debug registers";
const LATE: &str = "its emulator looks for interrupts only after several instructions";

const LIMITS: [Limit; 41] = [
    // Transfers of control from user code.
    limit("a_call_gate_copies_parameters_and_retf_drops_them", "left: []", GATES),
    limit("a_64_bit_call_gate_enters_the_kernel_and_retfq_leaves_it", "left: []", GATES),
    limit(
        "an_interrupt_from_user_mode_switches_to_the_stack_of_the_tss_and_iret_goes_back",
        "left: []",
        GATES,
    ),
    limit("int_n_needs_a_gate_that_user_code_may_use", "left: (6, None)", GATES),
    limit("a_stack_in_the_tss_of_the_wrong_privilege_raises_ts", "left: (6, None)", GATES),
    limit(
        "syscall_and_sysret_go_to_the_kernel_and_back_with_the_flags_masked",
        "SYSRET takes the flags from R11",
        "SYSCALL of native user code jumps to LSTAR without leaving user mode",
    ),
    // The host shows through in user code.
    limit(
        "alignment_checks_apply_in_user_mode_with_am_and_ac_only",
        "am false ac true user true",
        "user code runs natively, with the host's CR0.AM",
    ),
    limit(
        "popf_changes_if_and_iopl_only_with_the_privilege",
        "left: 512",
        "user code runs natively, with the host's EFLAGS.IF",
    ),
    // Paging.
    limit("a_cpu_goes_from_real_mode_through_all_modes_and_back", "left: TripleFault", PAGING),
    limit(
        "a_read_sets_accessed_and_only_a_write_sets_dirty_even_after_the_read",
        "left: TripleFault",
        PAGING,
    ),
    limit("every_paging_mode_translates_small_and_large_pages", "left: TripleFault", PAGING),
    limit("permissions_of_all_levels_count", "not TripleFault", PAGING),
    limit(
        "permissions_follow_user_write_execute_wp_smep_and_smap",
        "Execute by supervisor of page Utrue Wfalse Xtrue, cr4 0x200000",
        "SMAP keeps the supervisor from running user pages too, as only SMEP should",
    ),
    Limit {
        test: "five_levels_reach_addresses_beyond_48_bits",
        place: Where::Without(Feature::La57),
        reason: "it does not offer LA57",
        shows: "the state needs la57",
    },
    without_pcid("two_address_spaces_with_and_without_pcid_stay_apart"),
    without_pcid("a_write_to_cr3_without_the_keep_bit_forgets_the_space_it_goes_to"),
    without_pcid("an_identifier_given_to_another_space_brings_nothing_of_the_first"),
    without_pcid("code_rewritten_in_another_space_is_new_on_return"),
    without_pcid("each_space_sees_its_own_page_however_often_they_alternate"),
    without_pcid("every_form_of_invpcid_reaches_a_space_that_is_not_the_present_one"),
    without_pcid("every_form_of_invpcid_reaches_the_present_space"),
    without_pcid("global_pages_are_forgotten_by_invlpg_and_by_turning_them_off"),
    without_pcid("invpcid_refuses_forms_identifiers_and_addresses_that_do_not_exist"),
    limit(
        "without_identifiers_every_write_to_cr3_forgets_all_but_global_pages",
        "left: Exception(Exception { vector: 6",
        GATES,
    ),
    limit("popf_and_iret_take_a_waiting_interrupt_before_the_next_instruction", "left: []", LATE),
    limit(
        "sti_at_the_end_of_a_page_holds_interrupts_off_until_after_the_next_instruction",
        "left: []",
        LATE,
    ),
    limit("sti_lets_exactly_one_more_instruction_through", "left: []", LATE),
    limit(
        "sysret_takes_a_waiting_interrupt_before_the_first_user_instruction",
        "left: Exception(Exception { vector: 14",
        "SYSCALL of native user code jumps to LSTAR without leaving user mode",
    ),
    // Checks that the emulator leaves out.
    limit(
        "addresses_that_are_not_canonical_raise_gp_or_for_the_stack_ss",
        "left: (14, Some(0))",
        "its emulator walks the page tables for an address that is not canonical: #PF",
    ),
    limit(
        "a_store_across_pages_whose_second_is_missing_writes_nothing_and_names_the_second",
        "left: 18446462598732840960",
        "its emulator writes the first page before it looks at the second",
    ),
    limit(
        "a_fault_in_the_double_fault_handler_shuts_the_cpu_down",
        "failed: Real",
        "its emulator does not check the limit of IDTR in real mode",
    ),
    limit(
        "control_registers_refuse_combinations_that_do_not_exist",
        "expected an exception, not Done",
        "its emulator takes reserved bits of CR4",
    ),
    // Debugging.
    limit(
        "breakpoints_on_code_are_faults_and_on_data_are_traps",
        "expected an exception, not Done",
        BREAKPOINTS,
    ),
    limit("breakpoints_on_ports_trap_with_de", "expected an exception, not Done", BREAKPOINTS),
    limit("a_data_breakpoint_stops_after_the_access", "Kicked; said []", BREAKPOINTS),
    limit(
        "a_debugger_steps_over_a_halt_with_an_interrupt_waiting",
        "the guest hangs",
        "its emulator halts the CPU instructions after the HLT that was stepped over",
    ),
    limit(
        "a_load_of_ss_holds_the_single_step_trap_back_for_one_instruction",
        "left: (1, 32781)",
        "its emulator takes the single-step trap right after a load of SS",
    ),
    limit(
        "a_stepped_repeated_string_traps_after_each_element",
        "left: [0, 0, 0]",
        "its emulator takes the single-step trap only after the last round",
    ),
    // Interrupts.
    limit(
        "higher_priorities_come_first_and_interrupt_lower_ones",
        "left: [64, 80, 48, 65, 0, 0, 0, 2]",
        "its LAPIC shows no interrupt in service, and lets lower ones in",
    ),
    limit("sti_holds_a_pending_interrupt_back_for_exactly_one_instruction", "left: []", LATE),
    limit(
        "popf_that_sets_if_lets_a_pending_interrupt_in_before_the_next_instruction",
        "left: []",
        LATE,
    ),
];

/// Why a test cannot pass on this host's KVM, which offers guests the CPU `offered`.
pub fn limit_of(test: &str, offered: &CpuModel) -> Option<&'static Limit> {
    let limit = LIMITS.iter().find(|limit| limit.test == test)?;
    let applies = match limit.place {
        Where::NoHardware => !HostKvm::probe().is_hardware_backed(),
        Where::Without(feature) => !offered.features().has(feature),
    };
    applies.then_some(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_on_the_list_is_that_of_one_test() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests");
        let mut text = String::new();
        for file in std::fs::read_dir(folder).expect("the tests are there") {
            let path = file.expect("a file").path();
            text.push_str(&std::fs::read_to_string(path).expect("it can be read"));
        }
        let mut words: Vec<_> = text.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
        words.sort_unstable();
        for limit in &LIMITS {
            let found = words.iter().filter(|word| **word == limit.test).count();
            assert_eq!(found, 1, "{}", limit.test);
            assert_eq!(LIMITS.iter().filter(|other| other.test == limit.test).count(), 1);
        }
    }
}
