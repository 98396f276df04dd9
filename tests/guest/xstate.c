/*
 * Preloaded into linux.uml where the CPU's register state is larger than User-Mode
 * Linux 6.1 knows (AMX, APX; see tests/guest/run).
 *
 * UML keeps 2696 bytes of XSAVE state for each guest process, which reach to the
 * end of AVX-512 and PKRU. Reading it into that buffer is cut short and works;
 * PTRACE_SETREGSET takes nothing but the whole area, and fails with EFAULT.
 * Here the rest is filled in with zeros, and the bits that would give it a meaning
 * are taken out of the header: those registers are in their initial state, which
 * is what a guest that can't save them must see.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define NT_X86_XSTATE 0x202
#define XSTATE_BV_AT 512    /* XSAVE header: which components are not initial */
#define XSTATE_KNOWN 0x3ff  /* x87 to PKRU: what 2696 bytes can hold */

long ptrace(enum __ptrace_request request, ...)
{
	static char area[65536] __attribute__((aligned(64)));
	static size_t whole;
	va_list list;
	pid_t pid;
	void *addr, *data;
	long word;

	va_start(list, request);
	pid = va_arg(list, pid_t);
	addr = va_arg(list, void *);
	data = va_arg(list, void *);
	va_end(list);

	/* The C library turns these from a pointer's target into a result. */
	if (request == PTRACE_PEEKTEXT || request == PTRACE_PEEKDATA ||
	    request == PTRACE_PEEKUSER) {
		if (syscall(SYS_ptrace, request, pid, addr, &word) < 0)
			return -1;
		errno = 0;
		return word;
	}

	if (request == PTRACE_SETREGSET && (uintptr_t)addr == NT_X86_XSTATE) {
		const struct iovec *part = data;
		struct iovec all = { area, sizeof(area) };
		uint64_t components;

		if (whole == 0) {
			if (syscall(SYS_ptrace, PTRACE_GETREGSET, pid, addr, &all) < 0)
				return -1;
			whole = all.iov_len;
			memset(area, 0, sizeof(area));
		}
		if (part->iov_len >= XSTATE_BV_AT + 64 && part->iov_len < whole) {
			memcpy(area, part->iov_base, part->iov_len);
			memcpy(&components, area + XSTATE_BV_AT, sizeof(components));
			components &= XSTATE_KNOWN;
			memcpy(area + XSTATE_BV_AT, &components, sizeof(components));
			all.iov_len = whole;
			return syscall(SYS_ptrace, request, pid, addr, &all);
		}
	}
	return syscall(SYS_ptrace, request, pid, addr, data);
}
