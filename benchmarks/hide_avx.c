/*
 * Answers the instruction cpuid as a processor without AVX would.
 *
 * hidden_avx.py preloads this into a process whose LiteRT libraries it has copied and changed: where
 * they had cpuid (0f a2), the copies have 06 a2. 06, once "push es", is no instruction in 64-bit mode
 * and no compiler emits it, so that the processor raises SIGILL there and nowhere else. The handler
 * executes cpuid, takes AVX and what builds on it out of the answer, and goes on behind the two bytes.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <ucontext.h>

static volatile int answered;

/* How many cpuid instructions were answered; 0 says that nothing was hidden. */
int hide_avx_answered(void) { return answered; }

static void answer(int signal_number, siginfo_t *info, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const unsigned char *code = (const unsigned char *)registers[REG_RIP];
  (void)info;
  if (code[0] != 0x06 || code[1] != 0xa2) {
    signal(signal_number, SIG_DFL); /* a real fault: it comes again, and ends the process */
    return;
  }
  unsigned leaf = (unsigned)registers[REG_RAX], subleaf = (unsigned)registers[REG_RCX];
  unsigned a, b, c, d;
  __cpuid_count(leaf, subleaf, a, b, c, d);
  if (leaf == 1) {
    /* FMA, XSAVE, OSXSAVE, AVX, F16C */
    c &= ~(1u << 12 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 29);
  } else if (leaf == 7) {
    /* AVX2, every AVX-512 and AMX, along with all else that this leaf tells */
    b = c = d = 0;
    if (subleaf == 1) a = 0; /* AVX-VNNI; of subleaf 0 it is the number of subleaves */
  } else if (leaf == 0x80000001u) {
    c &= ~(1u << 11 | 1u << 16); /* XOP, FMA4 */
  }
  registers[REG_RAX] = a;
  registers[REG_RBX] = b;
  registers[REG_RCX] = c;
  registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
  answered++;
}

__attribute__((constructor)) static void install(void) {
  struct sigaction action = {0};
  action.sa_sigaction = answer;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, 0);
}
