"ARM's kernels on a machine that is none: the instructions that LLVM writes are read, and run under qemu where that is installed."
import re
import shutil
import subprocess
from collections import Counter

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir

from aquatic_nb.kernels import gemm, int8, simd, winograd  # noqa: F401  they register their emitters

CC, QEMU = shutil.which('aarch64-linux-gnu-gcc'), shutil.which('qemu-aarch64-static') or shutil.which('qemu-aarch64')
NEON = simd.Width('neon', *simd._BLOCKS['neon'], 'sdot')
LETTERS = dict(f=(ir.FloatType().as_pointer(), 'void*'), h=(ir.IntType(16).as_pointer(), 'void*'), q=(ir.IntType(64).as_pointer(), 'void*'),
               b=(ir.IntType(8).as_pointer(), 'void*'), w=(ir.IntType(32).as_pointer(), 'void*'), i=(ir.IntType(64), 'long'),
               s=(ir.FloatType(), 'float'))


def compiled(name, kinds, width=NEON, text=False):
    "An emitter as ARM code, an object file or its text; `kinds` has a letter an argument, 2f is a list of two."
    llvm.initialize_all_targets(); llvm.initialize_all_asmprinters()
    plan = [(LETTERS[k[-1]][0], int(k[:-1] or 0)) for k in kinds.split()]
    module = ir.Module()
    f = ir.Function(module, ir.FunctionType(ir.VoidType(), [k for k, n in plan for _ in range(n or 1)]), 'kernel')
    builder, given = ir.IRBuilder(f.append_basic_block()), iter(f.args)
    args = [[next(given) for _ in range(n)] if n else next(given) for _, n in plan]
    simd._emitters[name](simd.Emit(builder, width.lanes), width, *args)
    builder.ret_void()
    triple, cpu = simd.TARGETS['neon']
    module.triple = triple
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3, reloc='pic')
    ready = llvm.parse_assembly(str(module))
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(3))
    passes.getModulePassManager().run(ready, passes)
    return machine.emit_assembly(ready) if text else machine.emit_object(ready)


KINDS = {'_full': 'f i f i i i f i i', '_slim': 'f i i f i i f i i', 'i8_8_True': 'w q i q i b i i w f w i f f', 'i8_4_True': 'w q i q i b i i w f w i f f',
         'byte_product4': 'f i b i i f f i f i i', '_f2_gemm': '2h h i i i f i f i i', '_few4': '2f h i i i 2f f'}


def inner_loop(text):
    "From the label that the last conditional jump goes back to, to that jump."
    lines = [o.split('//')[0].strip() for o in text.splitlines()]
    ends = [i for i, o in enumerate(lines) if re.match(r'b\.\w+|cbnz|tbnz|tbz|cbz', o)]
    for end in reversed(ends):
        label = re.split(r'[\s,]+', lines[end])[-1] + ':'
        if label in lines[:end]: return [o for o in lines[lines.index(label) + 1:end] if o and not o.startswith('.')]
    raise AssertionError('no loop')


@pytest.mark.parametrize('name', KINDS)
def test_sums_stay_in_registers(name):
    loop = inner_loop(compiled(name, KINDS[name], text=True))
    did = Counter(o.split()[0] for o in loop)
    assert did['fmla'] + did['sdot'] >= dict(_few4=8, i8_4_True=12, byte_product4=12).get(name, 16), did
    assert not [o for o in loop if o.startswith(('st', 'bl '))], loop                 # a store is a sum that lost its register
    assert not [o for o in loop if o.startswith(('ldr q', 'ldp q')) and '[sp' in o], loop


def ran(folder, name, kinds, args, out):
    "Run an emitter on ARM: arrays and numbers in, the array at position `out` of the flat arguments back."
    object_, main, exe, data = folder/'kernel.o', folder/'main.c', folder/'kernel', b''
    object_.write_bytes(compiled(name, kinds))
    letters = [k[-1] for k in kinds.split() for _ in range(int(k[:-1] or 1))]
    said, spots = [], []
    for k, a in zip(letters, args, strict=True):
        spots.append(len(data))
        if isinstance(a, np.ndarray):
            data += a.tobytes() + bytes(-a.nbytes % 64 + 64)
            said.append(f'buf + {spots[-1]}')
        else: said.append(f'{float(a)}f' if k == 's' else f'{int(a)}L')
    main.write_text('#include <stdio.h>\nextern void kernel(' + ', '.join(LETTERS[k][1] for k in letters) + ');\n'
                    f'static char buf[{len(data)}] __attribute__((aligned(64)));\nint main(void) {{\n  if (fread(buf, 1, sizeof buf, stdin) != sizeof buf) '
                    f'return 1;\n  kernel({", ".join(said)});\n  return fwrite(buf, 1, sizeof buf, stdout) != sizeof buf;\n}}\n')
    subprocess.run([CC, '-static', '-O1', str(main), str(object_), '-o', str(exe)], check=True, capture_output=True)
    done = subprocess.run([QEMU, '-cpu', 'max', str(exe)], input=data, capture_output=True, check=True).stdout
    a = args[out]
    return np.frombuffer(done[spots[out]:spots[out] + a.nbytes], a.dtype).reshape(a.shape)


run_on_arm = pytest.mark.skipif(not (CC and QEMU), reason='needs Debian\'s gcc-aarch64-linux-gnu and qemu-user-static')
rng = np.random.default_rng(0)
def floats(*shape): return rng.standard_normal(shape).astype(np.float32)


@run_on_arm
def test_products_on_arm(tmp_path):
    R, P, L, k = NEON.rows, NEON.panels, NEON.lanes, 37
    a, b, y = floats(k, R), floats(P, k, L), np.zeros((R, P*L), np.float32)
    got = ran(tmp_path, '_full', KINDS['_full'], [a, 0, b, 0, k*L, k, y, 0, P*L], 6)
    np.testing.assert_allclose(got, np.einsum('kr,pkl->rpl', a.astype(float), b.astype(float)).reshape(R, -1), rtol=1e-5, atol=1e-5)
    q, s, bias = rng.integers(-128, 128, (k, P*L)).astype(np.int8), floats(P*L), floats(P*L)
    a = floats(k, 4)
    got = ran(tmp_path, 'byte_product4', KINDS['byte_product4'], [a, 0, q, 0, k, s, bias, 0, np.zeros((4, P*L), np.float32), 0, P*L], 8)
    np.testing.assert_allclose(got, a.T.astype(float)@q.astype(float)*s + bias, rtol=1e-4, atol=1e-3)


@run_on_arm
@pytest.mark.parametrize('rows', [8, 4])
def test_products_of_bytes_on_arm(tmp_path, rows):
    "Exact: u8 x s8 by way of a product of signed bytes."
    w, L, k = NEON, NEON.lanes, 24
    x, q = rng.integers(0, 256, (rows, k, 4)), rng.integers(-128, 128, (w.strips, k, L, 4)).astype(np.int8)
    zero, xs, scales = rng.integers(0, 256, rows), floats(rows), floats(w.strips*L)
    words = (x ^ 128).astype(np.uint8).view(np.int32).reshape(rows, k)
    koff, offs = np.arange(k), np.arange(rows)*k
    args = [words, koff, k, offs, 0, q, 0, k*L*4, (zero - 128).astype(np.int32), xs, q.astype(np.int32).sum((1, 3)).astype(np.int32).reshape(-1), 0,
            scales, np.zeros((rows, w.strips*L), np.float32)]
    got = ran(tmp_path, f'i8_{rows}_True', KINDS['i8_8_True'], args, 13)
    want = np.einsum('rkc,nklc->rnl', (x - zero[:, None, None]).astype(float), q.astype(float)).reshape(rows, -1)
    np.testing.assert_allclose(got, want*xs[:, None]*scales, rtol=1e-6)


@run_on_arm
def test_winograd_on_arm(tmp_path):
    L, wino = NEON.lanes, {k: np.array(v) for k, v in winograd._WINO[4].items()}
    plane, offs, out = floats(8, 40), np.arange(4)*4, np.zeros((36, L), np.float32)
    got = ran(tmp_path, '_f4_input', 'f i q i i f i i', [plane, 0, offs, 0, 40, out, 0, L], 5)
    tiles = np.stack([plane[:6, 4*t:4*t + 6] for t in range(L)], -1).astype(float)           # a run of four pixels is a tile
    np.testing.assert_allclose(got, np.einsum('ia,abt,jb->ijt', wino['BT'], tiles, wino['BT']).reshape(36, L), rtol=1e-4, atol=1e-4)
    m, y = floats(36, L), np.zeros((4, 16), np.float32)
    got = ran(tmp_path, '_f4_output', 'f i i s s f i q i i', [m, 0, L, 2., .5, y, 0, offs, 0, 16], 5)
    want = np.einsum('ia,abt,jb->itj', wino['AT'], m.reshape(6, 6, L).astype(float), wino['AT']).reshape(4, 16)*2 + .5
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)
    M, K, J, (R, T) = 2, 16, 5, winograd._f2_block(NEON)
    books, codes, V = [rng.integers(-500, 500, (K, 16)).astype(np.int16) for _ in range(M)], rng.integers(0, K, (R, J, M)).astype(np.int16), floats(J, T, 16)
    got = ran(tmp_path, '_f2_gemm', KINDS['_f2_gemm'], [*books, codes, 0, J*M, J, V, 0, np.zeros((R, T, 16), np.float32), 0, T*16], 8)
    weight = sum(books[m][codes[:, :, m]].astype(float) for m in range(M))
    np.testing.assert_allclose(got, np.einsum('rjp,jtp->rtp', weight, V.astype(float)), rtol=1e-4, atol=1e-1)
