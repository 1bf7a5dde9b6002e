"""A CUDA device that runs on the CPU, for checks where there is no GPU.

The kernels' text is C++ but for its first lines; with other first lines g++ compiles it. 128 threads of a block become 128 fibers, each with its
own stack, that run one after the other until they reach a barrier. `mma` is written from the instruction's documented layout. Around this stands
what a sanitizer would do: every buffer ends at (order 1: begins after) a page that may not be touched, shared memory starts as NaN, the fibers run
forward, backward or scattered, and threads that wait for ever are reported. It shows neither speed nor the mistakes of a compiler for GPUs.
"""
import ctypes
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

from aquatic_nb.kernels.cuda_runtime import CHIPS, Backend
from aquatic_nb.kernels.cuda_source import Args

can_emulate = shutil.which('g++') is not None and sys.platform.startswith('linux')

_FIBERS = r'''
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <vector>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
typedef unsigned char u8; typedef unsigned short u16;
typedef unsigned int u32; typedef unsigned long long u64;
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct Index { int x, y, z; };
#define KERNEL extern "C" void
#define DEVICE static inline
#define UNROLL
DEVICE int min(int a, int b) { return a < b ? a : b; }
static const int THREADS = 128;
static struct Thread { ucontext_t context; bool done; } threads[THREADS];
static struct Meeting { int arrived, generation; } warp_meeting[4], block_meeting;
static ucontext_t scheduler; static int current; static bool moved;
static Index blockIdx, gridDim, threadIdx, blockDim = {THREADS, 1, 1};
static uint4* shared_memory;
static void (*body)();

static void meet(Meeting& m, int size) {                    // wait until `size` threads are here
  int mine = m.generation;
  if (++m.arrived == size) { m.arrived = 0; m.generation++; moved = true; return; }
  while (m.generation == mine) swapcontext(&threads[current].context, &scheduler);
  moved = true;
}
DEVICE void warp_sync() { meet(warp_meeting[threadIdx.x/32], 32); }
DEVICE void block_sync() { meet(block_meeting, THREADS); }
static void begin() { body(); threads[current].done = true; moved = true; }

static int run_block(int order) {                           // 0: finished, 1: some threads wait for ever
  static std::vector<char> stacks(THREADS << 16);
  memset(warp_meeting, 0, sizeof warp_meeting); memset(&block_meeting, 0, sizeof block_meeting);
  for (int i = 0; i < THREADS; i++) {
    getcontext(&threads[i].context); threads[i].done = false;
    threads[i].context.uc_stack.ss_sp = &stacks[(size_t)i << 16];
    threads[i].context.uc_stack.ss_size = 1 << 16;
    threads[i].context.uc_link = &scheduler; makecontext(&threads[i].context, begin, 0);
  }
  for (int left = THREADS; left > 0; ) {
    moved = false; left = 0;
    for (int i = 0; i < THREADS; i++) {
      current = order == 0 ? i : order == 1 ? THREADS - 1 - i : (i*45 + 17) % THREADS;
      if (threads[current].done) continue;
      threadIdx.x = current; swapcontext(&scheduler, &threads[current].context);
      left += !threads[current].done;
    }
    if (left && !moved) return 1;
  }
  return 0;
}
'''

_ARITHMETIC = r'''
DEVICE float as_float(u32 bits) { float f; memcpy(&f, &bits, 4); return f; }
DEVICE u32 float_bits(float f) { u32 u; memcpy(&u, &f, 4); return u; }
DEVICE float from_half(u16 h) {
  int e = h >> 10 & 31, m = h & 1023;
  float f = e == 31 ? (m ? NAN : INFINITY) : e ? ldexpf(1024 + m, e - 25) : ldexpf(m, -24);
  return h >> 15 ? -f : f;
}
DEVICE u16 to_half(float f) {                               // round to nearest, ties to even
  u32 sign = float_bits(f) >> 16 & 0x8000; float a = fabsf(f); int e;
  if (a != a) return 0x7e00;
  if (a >= 65520.f) return sign | 0x7c00;
  if (a == 0) return sign;
  frexpf(a, &e); int last = (e - 1 < -14 ? -14 : e - 1) - 10;   // exponent of the last place
  return sign + ((last + 24) << 10) + (u32)nearbyintf(ldexpf(a, -last));
}
DEVICE u16 to_bf16(float f) { u32 u = float_bits(f); return f != f ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16; }
DEVICE float from_bf16(u16 h) { return as_float((u32)h << 16); }
DEVICE u32 bytes(u32 a, u32 b, u32 pick) {
  u64 both = (u64)b << 32 | a; u32 out = 0;
  for (int i = 0; i < 4; i++) out |= (u32)(both >> 8*(pick >> 4*i & 7) & 255) << 8*i;
  return out;
}
DEVICE u32 sub_halves(u32 a, u32 b) {
  return to_half(from_half(a) - from_half(b)) | (u32)to_half(from_half(a >> 16) - from_half(b >> 16)) << 16;
}
template<int BF16> DEVICE void mma(float* c, const u32* a, u32 b0, u32 b1) {
  static float A[4][16][16], B[4][16][8];                   // one product per warp, as the PTX manual lays it out
  int warp = threadIdx.x/32, g = threadIdx.x%32/4, t = threadIdx.x%4; u32 b[2] = {b0, b1};
  for (int i = 0; i < 2; i++) for (int r = 0; r < 4; r++) {
    u16 h = a[r] >> 16*i;
    A[warp][g + 8*(r & 1)][2*t + i + 8*(r >> 1)] = BF16 ? from_bf16(h) : from_half(h);
    if (r < 2) { h = b[r] >> 16*i; B[warp][2*t + i + 8*r][g] = BF16 ? from_bf16(h) : from_half(h); }
  }
  warp_sync();
  for (int i = 0; i < 4; i++) for (int k = 0; k < 16; k++)
    c[i] += A[warp][g + 8*(i >> 1)][k] * B[warp][k][2*t + (i & 1)];
  warp_sync();
}
static std::vector<std::pair<void*, size_t>> regions;
static void* guarded(size_t size, bool front) {             // ends (or begins) at a page that may not be touched
  size_t page = sysconf(_SC_PAGESIZE), room = (size + page - 1)/page*page;
  char* p = (char*)mmap(0, room + 2*page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mprotect(p + page, room, PROT_READ | PROT_WRITE);
  regions.push_back({p, room + 2*page});
  return p + page + (front ? 0 : room - size);
}
'''

_LAUNCH = r'''
static Args the_args;
static void enter() { ENTRY(the_args); }
extern "C" int launch(Args a, const u64* sizes, int gx, int gy, int gz, int shared, int order) {
  const void** field = (const void**)&a; const void* real[8];
  for (int i = 0; i < 8; i++) if (real[i] = field[i]) {     // every buffer moves next to a forbidden page
    field[i] = guarded(sizes[i], order == 1); memcpy((void*)field[i], real[i], sizes[i]);
  }
  gridDim = {gx, gy, gz}; body = enter; the_args = a; int stuck = 0;
  shared_memory = (uint4*)guarded((shared + 15)/16*16, order == 1);
  for (int z = 0; z < gz; z++) for (int y = 0; y < gy; y++) for (int x = 0; x < gx && !stuck; x++) {
    memset(shared_memory, 0xff, shared);                    // what was never written reads as NaN
    blockIdx = {x, y, z}; stuck = run_block(order);
  }
  for (int i = 6; i < 8; i++) if (real[i]) memcpy((void*)real[i], field[i], sizes[i]);
  for (auto& r : regions) munmap(r.first, r.second);
  regions.clear();
  return stuck;
}
'''


@lru_cache(64)
def emulated(program):
    "Compile a program for the CPU with g++ (RuntimeError if there is none, or if it fails): a library with one function, `launch`."
    if not can_emulate: raise RuntimeError('the emulator needs Linux and g++ on PATH; install g++ or skip the emulated checks')
    with tempfile.TemporaryDirectory(prefix='aquatic_nb_') as folder:
        source, out = Path(folder)/'kernel.cpp', Path(folder)/'kernel.so'
        source.write_text(program.text(_FIBERS + _ARITHMETIC) + _LAUNCH)
        options = ['-std=c++17', '-O1', '-w', '-fno-strict-aliasing', '-shared', '-fPIC', f'-DENTRY={program.kernel}']
        done = subprocess.run(['g++', *options, '-o', str(out), str(source)], capture_output=True, text=True)
        if done.returncode: raise RuntimeError(f'g++ could not compile {program}: {done.stderr[:500]}')
        return ctypes.CDLL(str(out))


class Emulator(Backend):
    "Runs launches on the CPU, one thread at a time; order 0: forward, 1: backward (and buffers guarded in front), 2: scattered."
    def __init__(self, order=0, chip=CHIPS[0]):
        super().__init__(chip)
        self.order = order

    def build(self, program): return emulated(program)
    def scratch(self, n, dtype, device): return torch.empty(n, dtype=dtype, device=device)

    def launch(self, launch, tensors, numbers):
        sizes = [0 if tensors.get(n) is None else tensors[n].nbytes for n in Args.BUFFERS]
        stuck = self.ready(launch).launch(Args.of(tensors, numbers), (ctypes.c_uint64*8)(*sizes), *launch.grid,
                                          launch.program.shared_bytes(), self.order)
        if stuck: raise RuntimeError(f'{launch.program.kernel}: some threads wait at a barrier that others never reach')
