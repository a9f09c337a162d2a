// A second set of programs for the benchmark kit, wider than deep: one row for each of many things
// that programs do, to find what a VMM does badly that the kit's own rows do not show.
// Same protocol as bench.c; build it in with `./make-initrd.sh wide`.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <immintrin.h>
#include <math.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>
typedef uint64_t u64;
typedef uint32_t u32;
typedef uint8_t u8;
#define NOINL __attribute__((noinline, noclone))
#define TARGET(x) __attribute__((target(x)))
static u64 seed = 88172645463325252ull;
static u64 rnd(void) { seed ^= seed << 13; seed ^= seed >> 7; seed ^= seed << 17; return seed; }
static u64 mix(u64 h, u64 v) { h ^= v; h *= 0x9E3779B97F4A7C15ull; return h ^ h >> 29; }
static void die(const char *what) { dprintf(1, "BENCH-ERROR %s errno=%d\n", what, errno); exit(3); }
static void *map(size_t n) {
    void *p = mmap(0, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) die("mmap");
    return p;
}

/* Integer. */
static u64 int_div(u64 n) { u64 h = 1; for (u64 i = 1; i <= n; i++) h = h * 31 + (h ^ i * 0x123456789ull) / (i | 1) + (u32)h % (u32)(i | 3); return h; }
static u64 int_bits(u64 n) { u64 h = 1; for (u64 i = 0; i < n; i++) { u64 x = h + i; h ^= (x << (i & 63) | x >> (-i & 63)) + __builtin_ctzll(x | 1) + __builtin_clzll(x | 1) + __builtin_bswap64(x); } return h; }
static u64 int_adc(u64 n) { // 256-bit additions with carries
    u64 a[4] = {1, 2, 3, 4}, b[4] = {~0ull, 5, ~0ull, 7};
    for (u64 i = 0; i < n; i++) { unsigned char c = 0; for (int k = 0; k < 4; k++) c = _addcarry_u64(c, a[k], b[k], (unsigned long long *)&a[k]); b[i & 3] ^= a[(i + 1) & 3] + c; }
    return mix(mix(a[0], a[1]), mix(a[2], a[3]));
}
static u64 int_crc(u64 n) { static u32 t[256]; for (u32 i = 0; i < 256; i++) { u32 c = i; for (int k = 0; k < 8; k++) c = c & 1 ? 0xedb88320u ^ c >> 1 : c >> 1; t[i] = c; } static u8 buf[65536]; for (int i = 0; i < 65536; i++) buf[i] = rnd(); u32 c = ~0u; for (u64 r = 0; r < n; r++) for (int i = 0; i < 65536; i++) c = t[(u8)(c ^ buf[i])] ^ c >> 8; return c; }
static u64 int_sieve(u64 n) { u64 s = 0; u8 *p = map(1 << 20); for (u64 r = 0; r < n; r++) { memset(p, 1, 1 << 20); for (u32 i = 2; i * i < 1 << 20; i++) if (p[i]) for (u32 k = i * i; k < 1 << 20; k += i) p[k] = 0; for (u32 i = 2; i < 1 << 20; i += 997) s += p[i] * i; } munmap(p, 1 << 20); return s; }
static u64 int_hash(u64 n) { // open-addressing table, random access
    enum { M = 1 << 18 }; u64 *t = map(M * 8), h = 0;
    for (u64 i = 0; i < n; i++) { u64 k = rnd() >> 20 | 1, at = k * 0x9E3779B97F4A7C15ull >> 46; for (int d = 0; d < 8 && t[at] && t[at] != k; d++) at = (at + 1) & (M - 1); h += t[at] == k; t[at] = k; }
    munmap(t, M * 8); return h;
}
static u64 int_life(u64 n) { enum { W = 256 }; static u8 a[W][W], b[W][W]; for (int y = 0; y < W; y++) for (int x = 0; x < W; x++) a[y][x] = rnd() & 1; for (u64 r = 0; r < n; r++) { for (int y = 0; y < W; y++) for (int x = 0; x < W; x++) { int c = 0; for (int d = 0; d < 9; d++) if (d != 4) c += a[(y + d / 3 - 1) & (W - 1)][(x + d % 3 - 1) & (W - 1)]; b[y][x] = c == 3 || (c == 2 && a[y][x]); } memcpy(a, b, sizeof a); } u64 h = 0; for (int i = 0; i < W; i++) h = mix(h, a[i][i * 7 & (W - 1)]); return h; }

/* Branches and calls. */
static int depth(int n, volatile u64 *s) { if (!n) return 1; *s += n; return depth(n - 1, s) + (*s & 1); }
static u64 br_deep(u64 n) { volatile u64 s = 0; u64 h = 0; for (u64 i = 0; i < n; i++) h += depth(2000, &s); return h + s; }
static u64 br_setjmp(u64 n) { static jmp_buf j; volatile u64 c = 0; while (c < n) { if (!setjmp(j)) longjmp(j, 1); c++; } return c; }
static NOINL u64 fa(u64 x) { return x * 3; } static NOINL u64 fb(u64 x) { return x + 7; } static NOINL u64 fc(u64 x) { return x ^ x >> 3; } static NOINL u64 fd(u64 x) { return ~x; }
static u64 br_virtual(u64 n) { static u64 (*const t[4])(u64) = {fa, fb, fc, fd}; u64 h = 1; for (u64 i = 0; i < n; i++) h = t[h & 3](h + i); return h; }
static u64 br_switch(u64 n) { u64 h = 1; for (u64 i = 0; i < n; i++) switch ((h ^ i) % 11) { case 0: h += 3; break; case 1: h *= 5; break; case 2: h ^= i; break; case 3: h -= 7; break; case 4: h = h >> 1 | h << 63; break; case 5: h += i * i; break; case 6: h = ~h; break; case 7: h ^= h >> 7; break; case 8: h *= 9; break; case 9: h += 11; break; default: h -= i; } return h; }
static u64 br_coroutine(u64 n);
static ucontext_t main_c, co_c; static u64 co_n;
static void co(void) { for (;;) { co_n++; swapcontext(&co_c, &main_c); } }
static u64 br_coroutine(u64 n) { static char st[65536]; getcontext(&co_c); co_c.uc_stack.ss_sp = st; co_c.uc_stack.ss_size = sizeof st; makecontext(&co_c, co, 0); for (u64 i = 0; i < n; i++) swapcontext(&main_c, &co_c); return co_n; }
static int cmpu(const void *a, const void *b) { u32 x = *(u32 *)a, y = *(u32 *)b; return x < y ? -1 : x > y; }
static u64 br_qsort(u64 n) { u32 *a = map(n * 4); for (u64 i = 0; i < n; i++) a[i] = rnd(); qsort(a, n, 4, cmpu); u64 h = 0; for (u64 i = 0; i < n; i += 97) h = mix(h, a[i]); munmap(a, n * 4); return h; }
struct node { struct node *l, *r; u64 k; };
static struct node *ins(struct node *t, struct node *x) { if (!t) return x; if (x->k < t->k) t->l = ins(t->l, x); else t->r = ins(t->r, x); return t; }
static u64 br_tree(u64 n) { struct node *p = calloc(n, sizeof *p), *t = 0; for (u64 i = 0; i < n; i++) { p[i].k = rnd(); t = ins(t, p + i); } u64 h = 0; for (u64 i = 0; i < n; i++) { struct node *q = t; u64 d = 0; while (q && q->k != p[i].k) q = p[i].k < q->k ? q->l : q->r, d++; h += d; } free(p); return h; }

/* Memory. */
static u64 mem_malloc(u64 n) { void *p[512] = {0}; u64 h = 0; for (u64 i = 0; i < n; i++) { u64 r = rnd(); free(p[r & 511]); size_t k = (r >> 9 & 1023) + 8; char *c = malloc(k); c[0] = 1; c[k - 1] = 2; p[r & 511] = c; h += k; } for (int i = 0; i < 512; i++) free(p[i]); return h; }
static u64 mem_random(u64 n) { enum { M = 1 << 22 }; u64 *p = map(M * 8), h = 0; for (u64 i = 0; i < n; i++) { u64 r = rnd(); p[r & (M - 1)] += r; h ^= p[r >> 32 & (M - 1)]; } munmap(p, M * 8); return h; }
static u64 mem_copy64(u64 n) { static u8 a[1 << 16], b[1 << 16]; u64 h = 0; for (u64 i = 0; i < n; i++) { u64 r = rnd(); size_t k = 16 + (r & 255); memcpy(b + (r >> 8 & 0x7fff), a + (r >> 24 & 0x7fff), k); h += b[r >> 8 & 0x7fff]; a[r >> 40 & 0x7fff]++; } return h; }
static u64 mem_memset(u64 n) { u8 *p = map(1 << 22); u64 h = 0; for (u64 i = 0; i < n; i++) { memset(p, i, 1 << 22); h += p[i * 4099 & 0x3fffff]; } munmap(p, 1 << 22); return h; }
static u64 mem_string(u64 n) { static char t[1 << 16]; for (int i = 0; i < 1 << 16; i++) t[i] = i % 61 ? 'a' + rnd() % 26 : ' '; t[65535] = 0; u64 h = 0; for (u64 i = 0; i < n; i++) { char *p = t; while ((p = strchr(p, ' '))) p++, h++; h += strlen(t) + !!strstr(t, "zzqqzz") + !!memchr(t, '#', 65535); } return h; }
static u64 mem_bytes(u64 n) { static u8 a[4096]; u64 h = 0; for (u64 i = 0; i < n; i++) for (int k = 0; k < 4096; k++) { a[k] += (u8)(k ^ i); h += a[(k * 7) & 4095]; } return h; }
static u64 mem_lock(u64 n) { static u64 c; u64 h = 0; for (u64 i = 0; i < n; i++) { __atomic_fetch_add(&c, i, 5); u64 e = c; __atomic_compare_exchange_n(&c, &e, e * 3, 0, 5, 5); h += __atomic_exchange_n(&c, e ^ i, 5); } return h; }
static u64 mem_matrix(u64 n) { enum { K = 512 }; static u32 a[K][K], b[K][K]; for (int i = 0; i < K; i++) for (int k = 0; k < K; k++) a[i][k] = rnd(); u64 h = 0; for (u64 r = 0; r < n; r++) { for (int i = 0; i < K; i++) for (int k = 0; k < K; k++) b[k][i] = a[i][k] + r; h += b[r & 511][r * 7 & 511]; } return h; }

/* Floating point and vectors. */
static u64 bits(double d) { u64 u; memcpy(&u, &d, 8); return u; }
static u64 fp_mandel(u64 n) { u64 h = 0; for (u64 i = 0; i < n; i++) { double cx = -2 + 3.0 * (i % 997) / 997, cy = -1 + 2.0 * (i % 613) / 613, x = 0, y = 0; int k = 0; for (; k < 100 && x * x + y * y < 4; k++) { double t = x * x - y * y + cx; y = 2 * x * y + cy; x = t; } h += k; } return h; }
static u64 fp_float(u64 n) { static float a[1024], b[1024]; for (int i = 0; i < 1024; i++) a[i] = i * .5f, b[i] = 1.f / (i + 1); float s = 0; for (u64 r = 0; r < n; r++) for (int i = 0; i < 1024; i++) { a[i] = a[i] * .99f + b[i]; s += a[i] > 1 ? a[i] : -b[i]; } return bits(s); }
static u64 fp_convert(u64 n) { double s = 0; u64 h = 0; for (u64 i = 0; i < n; i++) { s += (double)(long)(h + i) * 1e-3; h = h * 3 + (u64)(long)(s / 7) + (u32)(int)(float)i; if (s > 1e12) s = 1; } return mix(h, bits(s)); }
static u64 fp_sqrt(u64 n) { double s = 0; for (u64 i = 1; i < n; i++) s += sqrt(i + s * 1e-9) / (i + 1.5); return bits(s); }
static u64 fp_long(u64 n) { volatile long double x = 1; for (u64 i = 1; i < n; i++) x = x * 1.0000001L + 1.0L / i; return bits((double)x); }
static u64 fp_libm(u64 n) { double s = 0; for (u64 i = 0; i < n; i++) s += sin(i * .001) * exp(-(double)(i & 15)) + log(i + 1.); return bits(floor(s * 1e3)); }
static TARGET("avx2,fma") u64 vec_fma(u64 n) { __m256d a = _mm256_set1_pd(1.0000001), b = _mm256_set1_pd(1e-9), c[8]; for (int k = 0; k < 8; k++) c[k] = _mm256_set1_pd(k + 1); for (u64 i = 0; i < n; i++) for (int k = 0; k < 8; k++) c[k] = _mm256_fmadd_pd(c[k], a, b); u64 h = 0; for (int k = 0; k < 8; k++) h = mix(h, bits(((double *)&c[k])[k & 3])); return h; }
static TARGET("avx2") u64 vec_int(u64 n) { static u8 s[1 << 15]; for (int i = 0; i < 1 << 15; i++) s[i] = i * 7; __m256i acc = _mm256_setzero_si256(), m = _mm256_set1_epi8(15); for (u64 r = 0; r < n; r++) for (int i = 0; i < 1 << 15; i += 32) { __m256i v = _mm256_loadu_si256((void *)(s + i)); v = _mm256_shuffle_epi8(v, _mm256_and_si256(v, m)); acc = _mm256_add_epi64(acc, _mm256_sad_epu8(v, m)); } return ((u64 *)&acc)[0] + ((u64 *)&acc)[2]; }
static TARGET("aes,sse4.1") u64 vec_aes(u64 n) { __m128i x = _mm_set1_epi32(5), k = _mm_set1_epi32(77); for (u64 i = 0; i < n; i++) { for (int r = 0; r < 10; r++) x = _mm_aesenc_si128(x, k); k = _mm_add_epi32(k, x); } return _mm_extract_epi64(x, 0); }
static TARGET("sse4.2") u64 vec_str(u64 n) { static char t[4096]; for (int i = 0; i < 4096; i++) t[i] = 'a' + i % 23; __m128i needle = _mm_setr_epi8('x', 'y', 'z', '0', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0); u64 h = 0; for (u64 r = 0; r < n; r++) for (int i = 0; i < 4096; i += 16) h += _mm_cmpistri(needle, _mm_loadu_si128((void *)(t + i)), 0); u32 c = 0; for (u64 r = 0; r < n; r++) for (int i = 0; i < 4096; i += 8) c = _mm_crc32_u64(c, *(u64 *)(t + i)); return h + c; }

/* System calls and files. */
static u64 sys_stat(u64 n) { struct stat s; u64 h = 0; for (u64 i = 0; i < n; i++) h += !stat("/dev/null", &s); return h; }
static u64 sys_openclose(u64 n) { for (u64 i = 0; i < n; i++) { int f = open("/dev/null", O_RDONLY); if (f < 0) die("open"); close(f); } return n; }
static u64 sys_rw(u64 n) { int f = open("/dev/shm/w", O_CREAT | O_RDWR | O_TRUNC, 0600); char b[4096]; u64 h = 0; memset(b, 7, sizeof b); for (u64 i = 0; i < n; i++) { pwrite(f, b, 4096, i % 64 * 4096); pread(f, b, 512, i % 64 * 4096); h += b[i & 511]; } close(f); unlink("/dev/shm/w"); return h; }
static u64 sys_create(u64 n) { char p[64]; for (u64 i = 0; i < n; i++) { snprintf(p, 64, "/dev/shm/f%d", (int)(i & 63)); int f = open(p, O_CREAT | O_RDWR, 0600); if (write(f, p, 8) != 8) die("write"); close(f); unlink(p); } return n; }
static u64 sys_gettime(u64 n) { struct timeval t; u64 bad = 0; double last = 0; for (u64 i = 0; i < n; i++) { gettimeofday(&t, 0); double x = t.tv_sec + t.tv_usec * 1e-6; bad += x < last; last = x; } return bad; }
static u64 sys_cpuid(u64 n) { u64 h = 0; for (u64 i = 0; i < n; i++) { u32 a = 0, b, c = 0, d; __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d)); h += !!b; } return h; }
static u64 ipc_socket(u64 n) { int s[2]; socketpair(AF_UNIX, SOCK_STREAM, 0, s); if (!fork()) { char b[256]; ssize_t k; close(s[0]); while ((k = read(s[1], b, 256)) > 0) if (write(s[1], b, k) != k) break; _exit(0); } close(s[1]); char b[256] = {0}; u64 h = 0; for (u64 i = 0; i < n; i++) { b[0] = i; if (write(s[0], b, 256) != 256) die("write"); size_t g = 0; while (g < 256) { ssize_t k = read(s[0], b + g, 256 - g); if (k <= 0) die("read"); g += k; } h += (u8)b[0]; } close(s[0]); wait(0); return h; }
static u64 ipc_eventfd(u64 n) { int e = eventfd(0, 0), p = epoll_create1(0); struct epoll_event v = {.events = EPOLLIN}; epoll_ctl(p, EPOLL_CTL_ADD, e, &v); u64 h = 0, x; for (u64 i = 0; i < n; i++) { x = 1; if (write(e, &x, 8) != 8 || epoll_wait(p, &v, 1, -1) != 1 || read(e, &x, 8) != 8) die("eventfd"); h += x; } close(e); close(p); return h; }
static u64 ipc_poll(u64 n) { int f[32][2]; struct pollfd p[32]; for (int i = 0; i < 32; i++) { if (pipe(f[i])) die("pipe"); p[i].fd = f[i][0]; p[i].events = POLLIN; } u64 h = 0; char c; for (u64 i = 0; i < n; i++) { int k = i & 31; if (write(f[k][1], "x", 1) != 1) die("write"); poll(p, 32, -1); h += !!(p[k].revents & POLLIN); if (read(f[k][0], &c, 1) != 1) die("read"); } for (int i = 0; i < 32; i++) close(f[i][0]), close(f[i][1]); return h; }
static pthread_mutex_t pm = PTHREAD_MUTEX_INITIALIZER; static pthread_cond_t pc = PTHREAD_COND_INITIALIZER; static volatile int turn; static u64 rounds;
static void *pong(void *a) { (void)a; for (u64 i = 0; i < rounds; i++) { pthread_mutex_lock(&pm); while (turn != 1) pthread_cond_wait(&pc, &pm); turn = 0; pthread_cond_signal(&pc); pthread_mutex_unlock(&pm); } return 0; }
static u64 ipc_futex(u64 n) { pthread_t t; rounds = n; turn = 0; pthread_create(&t, 0, pong, 0); for (u64 i = 0; i < n; i++) { pthread_mutex_lock(&pm); while (turn != 0) pthread_cond_wait(&pc, &pm); turn = 1; pthread_cond_signal(&pc); pthread_mutex_unlock(&pm); } pthread_join(t, 0); return n; }

/* Processes, memory management, signals. */
static u64 proc_fork(u64 n) { u64 h = 0; for (u64 i = 0; i < n; i++) { pid_t p = fork(); if (!p) _exit(i & 7); int s; waitpid(p, &s, 0); h += WEXITSTATUS(s); } return h; }
static void *nothing(void *a) { return a; }
static u64 proc_thread(u64 n) { for (u64 i = 0; i < n; i++) { pthread_t t; if (pthread_create(&t, 0, nothing, 0)) die("pthread_create"); pthread_join(t, 0); } return n; }
static u64 proc_bigfork(u64 n) { u8 *p = map(32 << 20); memset(p, 1, 32 << 20); u64 h = 0; for (u64 i = 0; i < n; i++) { pid_t c = fork(); if (!c) { for (int k = 0; k < 2 << 20; k += 4096) p[k] = i; _exit(p[4096] & 63); } int s; waitpid(c, &s, 0); h += WEXITSTATUS(s); } munmap(p, 32 << 20); return h; }
static char bb[256] = "/bin/busybox";
static u64 proc_shell(u64 n) { if (access(bb, X_OK)) snprintf(bb, 256, "%s", getenv("BB")); u64 h = 0; for (u64 i = 0; i < n; i++) { pid_t p = fork(); if (!p) { execl(bb, "busybox", "sh", "-c", "x=0; for i in 1 2 3 4 5; do x=$((x+i)); done; exit $x", (char *)0); _exit(127); } int s; waitpid(p, &s, 0); h += WEXITSTATUS(s); } return h; }
static u64 mm_mmap(u64 n) { u64 h = 0; for (u64 i = 0; i < n; i++) { u8 *p = map(16 * 4096); for (int k = 0; k < 16; k++) p[k * 4096] = k; h += p[i % 16 * 4096]; munmap(p, 16 * 4096); } return h; }
static u64 mm_mprotect(u64 n) { u8 *p = map(64 * 4096); memset(p, 1, 64 * 4096); u64 h = 0; for (u64 i = 0; i < n; i++) { u8 *q = p + i % 64 * 4096; mprotect(q, 4096, PROT_READ); h += *q; mprotect(q, 4096, PROT_READ | PROT_WRITE); *q += 1; } munmap(p, 64 * 4096); return h; }
static u64 mm_madvise(u64 n) { u8 *p = map(64 * 4096); u64 h = 0; for (u64 i = 0; i < n; i++) { for (int k = 0; k < 64; k++) p[k * 4096] = i; madvise(p, 64 * 4096, MADV_DONTNEED); h += p[i % 64 * 4096]; } munmap(p, 64 * 4096); return h; }
static u8 *guarded; static volatile u64 hits;
static void on_segv(int s, siginfo_t *i, void *c) { (void)s; (void)c; hits++; mprotect((void *)((u64)i->si_addr & ~4095ull), 4096, PROT_READ | PROT_WRITE); }
static u64 sig_segv(u64 n) { struct sigaction a = {0}; a.sa_sigaction = on_segv; a.sa_flags = SA_SIGINFO; sigaction(SIGSEGV, &a, 0); guarded = map(64 * 4096); for (u64 i = 0; i < n; i++) { u8 *q = guarded + i % 64 * 4096; mprotect(q, 4096, PROT_NONE); *q = i; } return hits; }
static void on_alarm(int s) { (void)s; hits++; }
static u64 sig_timer(u64 n) { struct sigaction a = {0}; a.sa_handler = on_alarm; sigaction(SIGALRM, &a, 0); struct itimerval t = {{0, 500}, {0, 500}}, z = {{0, 0}, {0, 0}}; setitimer(ITIMER_REAL, &t, 0); u64 h = 0, k = 0; while (hits < n) h = mix(h, k++); setitimer(ITIMER_REAL, &z, 0); return h != 1; }

static const struct { const char *name; u64 (*run)(u64); u64 work; } rows[] = {
    {"int_div", int_div, 8000000}, {"int_bits", int_bits, 40000000}, {"int_adc", int_adc, 15000000}, {"int_crc", int_crc, 600},
    {"int_sieve", int_sieve, 30}, {"int_hash", int_hash, 3000000}, {"int_life", int_life, 120},
    {"br_deep", br_deep, 10000}, {"br_setjmp", br_setjmp, 8000000}, {"br_virtual", br_virtual, 25000000}, {"br_switch", br_switch, 20000000},
    {"br_coroutine", br_coroutine, 200000}, {"br_qsort", br_qsort, 700000}, {"br_tree", br_tree, 150000},
    {"mem_malloc", mem_malloc, 4000000}, {"mem_random", mem_random, 6000000}, {"mem_copy64", mem_copy64, 12000000}, {"mem_memset", mem_memset, 500},
    {"mem_string", mem_string, 8000}, {"mem_bytes", mem_bytes, 15000}, {"mem_lock", mem_lock, 5000000}, {"mem_matrix", mem_matrix, 150},
    {"fp_mandel", fp_mandel, 700000}, {"fp_float", fp_float, 30000}, {"fp_convert", fp_convert, 12000000}, {"fp_sqrt", fp_sqrt, 8000000},
    {"fp_long", fp_long, 8000000}, {"fp_libm", fp_libm, 2500000}, {"vec_fma", vec_fma, 30000000}, {"vec_int", vec_int, 40000},
    {"vec_aes", vec_aes, 5000000}, {"vec_str", vec_str, 60000},
    {"sys_stat", sys_stat, 250000}, {"sys_openclose", sys_openclose, 150000}, {"sys_rw", sys_rw, 150000}, {"sys_create", sys_create, 40000},
    {"sys_gettime", sys_gettime, 4000000}, {"sys_cpuid", sys_cpuid, 20000}, {"ipc_socket", ipc_socket, 20000}, {"ipc_eventfd", ipc_eventfd, 120000},
    {"ipc_poll", ipc_poll, 60000}, {"ipc_futex", ipc_futex, 20000}, {"proc_fork", proc_fork, 1000}, {"proc_thread", proc_thread, 8000},
    {"proc_bigfork", proc_bigfork, 60}, {"proc_shell", proc_shell, 200}, {"mm_mmap", mm_mmap, 20000}, {"mm_mprotect", mm_mprotect, 60000},
    {"mm_madvise", mm_madvise, 4000}, {"sig_segv", sig_segv, 40000}, {"sig_timer", sig_timer, 200},
};
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec * 1e-9; }
static double used(void) { struct rusage a, b; getrusage(RUSAGE_SELF, &a); getrusage(RUSAGE_CHILDREN, &b); return a.ru_utime.tv_sec + a.ru_stime.tv_sec + b.ru_utime.tv_sec + b.ru_stime.tv_sec + 1e-6 * (a.ru_utime.tv_usec + a.ru_stime.tv_usec + b.ru_utime.tv_usec + b.ru_stime.tv_usec); }
static void say(const char *format, ...) { char b[256]; va_list a; va_start(a, format); int n = vsnprintf(b, sizeof b, format, a); va_end(a); for (int o = 0; o < n;) { int k = write(1, b + o, n - o); if (k <= 0) break; o += k; } tcdrain(1); }
int main(int count, char **args) {
    const int total = sizeof rows / sizeof *rows;
    if (count >= 3 && !strcmp(args[1], "-say")) { say("%s\n", args[2]); return 0; }
    if (count < 2 || !strcmp(args[1], "-l")) { for (int i = 0; i < total; i++) printf("%s\n", rows[i].name); return 0; }
    double scale = count > 2 ? atof(args[2]) : 1;
    for (int i = 0; i < total; i++) {
        if (strcmp(rows[i].name, args[1])) continue;
        u64 n = rows[i].work * scale;
        say("START %s\n", args[1]);
        double cpu = used(), start = now();
        u64 sum = rows[i].run(n < 4 ? 4 : n);
        double end = now();
        say("BENCH %s %.6f %016llx %.6f\n", args[1], end - start, (unsigned long long)sum, used() - cpu);
        return 0;
    }
    say("BENCH-ERROR unknown %s\n", args[1]);
    return 2;
}
