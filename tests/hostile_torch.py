"""Damaged and hostile PyTorch checkpoints, kind by kind, made from a small sound one.

A kind gives (name, what the sentence of `from_torch` must contain, how the file is made).
"""

from __future__ import annotations

import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from convert.formats import torch_file
from convert.to_torch import plain_cfg
from uva_jax.cli import bench_conversion
from uva_jax.models import description
from uva_jax.models.policy_config import MARConfig, MLPHeadConfig, PolicyConfig, VAEConfig

Made = Iterator[tuple[str, str, Callable[[Path], object]]]

_HEAD = dict(z_channels=8, width=8, depth=1, grid=(2, 2))
CONFIG = PolicyConfig(
    image_size=4,
    vae=VAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_levels=(), z_channels=2),
    mar=MARConfig(
        encoder_embed_dim=8,
        encoder_depth=1,
        encoder_num_heads=2,
        decoder_embed_dim=8,
        decoder_depth=1,
        decoder_num_heads=2,
        grid=(2, 2),
        token_dim=2,
    ),
    video_head=MLPHeadConfig(channels=2, clip=False, **_HEAD),
    action_head=MLPHeadConfig(channels=2, aggregator="conv_ori", **_HEAD),
    normalizer_fields=(("action", 2),),
)
WEIGHT = "model.z_proj.weight"  # the tensor that is damaged where one is enough


def sound_state(seed: int = 0) -> dict[str, np.ndarray]:
    """The state dict of a small policy, random."""
    rng = np.random.default_rng(seed)
    shapes = bench_conversion.torch_shapes(CONFIG)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def sound(path: Path, state: dict | None = None, **payload: object) -> Path:
    """Writes a checkpoint that converts; or one with another state dict or other entries."""
    values = {
        "cfg": torch_file.records_from_dict(plain_cfg(CONFIG)),
        "state_dicts": {"ema_model": sound_state() if state is None else state},
        "pickles": {"epoch": pickle.dumps(5)},
    }
    torch_file.write(path, {k: v for k, v in (values | payload).items() if v is not None})
    return path


# ---- by hand: archives, pickles, tensors that lie ----


def archive(path: Path, pickled: bytes, entries=(), byteorder=b"little", **options) -> Path:
    """A zip with `pickled` as its data.pkl; names that begin with "!" stand outside its folder."""
    with zipfile.ZipFile(path, "w", **options) as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of duplicate names
        for name, content in (("data.pkl", pickled), ("byteorder", byteorder), *entries):
            out.writestr(f"archive/{name}" if not name.startswith("!") else name[1:], content)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def gadgets(marker: str) -> dict[str, bytes]:
    """Pickles that would create the file `marker`, or fork, if anything in them were run."""
    shell = text(f"touch {marker}")
    python = text(f"open({marker!r}, 'w')")
    system = b"cos\nsystem\n" + shell + b"\x85R"
    stacked = text("os") + text("system") + b"\x93" + shell
    dotted = text("pathlib") + text("os.system") + b"\x93" + shell
    ordered = b"ccollections\nOrderedDict\n"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + system + b"K\x00))\x89}tR"
    setstate = b"cos\n_wrap_close\n)\x81}" + text("__setstate__") + b"cos\nsystem\nsb" + shell
    bodies = {
        "os.system": system,
        "posix.system": b"cposix\nsystem\n" + shell + b"\x85R",
        "exec": b"cbuiltins\nexec\n" + python + b"\x85R",
        "eval in python 2 spelling": b"c__builtin__\neval\n" + python + b"\x85R",
        "stack global": stacked + b"\x85R",
        "dotted name": dotted + b"\x85R",
        "inst": b"(" + shell + b"ios\nsystem\n",
        "obj": b"(cos\nsystem\n" + shell + b"o",
        "newobj": b"cos\nsystem\n" + shell + b"\x85\x81",
        "newobj_ex": stacked + b"\x85}\x92",
        "nested in arguments": ordered + b"(](" + text("k") + system + b"tatR",
        "nested in a tensor": tensor,
        "second state": setstate + b"b",
        "state of a dictionary": ordered + b")R}" + text("_metadata") + system + b"sb",
        "persistent id": system + b"Q",
        "dictionary key": b"}" + system + b"Ns",
        "called result": b"cbuiltins\ngetattr\n(cos\nfork\n" + text("__call__") + b"tR)R",
        "dill loader": b"cdill._dill\n_load_type\n" + text("CodeType") + b"\x85R)R",
        "extension registry": b"\x82\x01",
    }
    protocol = {"stack global": 4, "dotted name": 4, "newobj_ex": 4, "inst": 1, "obj": 1}
    return {k: bytes((0x80, protocol.get(k, 2))) + body + b"." for k, body in bodies.items()}


def tensor_pickle(shape, strides, offset=0, numel=4, kind="FloatStorage", key="0") -> bytes:
    """The pickle of one tensor, spelled by hand so that it can lie."""
    storage = pickle.dumps(("storage", None, key, "cpu", numel), 2)[2:-1]
    storage = storage.replace(b"N", b"ctorch\n" + kind.encode() + b"\n", 1)
    rest = b"".join(pickle.dumps(v, 2)[2:-1] for v in (offset, shape, strides, False, {}))
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"Q" + rest + b"tR."


LYING_TENSORS = {
    "longer than its storage": ((2, 3), (3, 1)),
    "strides beyond its storage": ((2, 2), (3, 1)),
    "offset beyond its storage": ((2,), (1,), 3),
    "negative stride": ((2,), (-1,), 3),
    "negative extent": ((-2,), (1,)),
    "negative offset": ((2,), (1,), -1),
    "shape without strides": ((2, 2), (1,)),
    "extent of 2**70": ((1 << 70,), (0,)),
    "expanded to 4 TB": ((1 << 40,), (0,)),
    "storage longer than its entry": ((2,), (1,), 0, 8),
    "storage of negative length": ((2,), (1,), 0, -1),
    "storage outside the folder": ((2,), (1,), 0, 4, "FloatStorage", "../0"),
    "quantized storage": ((2,), (1,), 0, 4, "QInt8Storage"),
}


def pickle_bombs() -> dict[str, bytes]:
    """Short pickles that would take endless time, memory or stack."""
    million = b"X" + struct.pack("<I", 1 << 18) + b"a" * (1 << 18)
    copies = b"c_codecs\nencode\nq\x00" + million + text("latin1") + b"\x86q\x01]"
    return {
        "copies of a long text": b"\x80\x02" + copies + b"h\x00h\x01Ra" * 5000 + b".",
        "deep key": b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.",
        "doubled key": b"\x80\x02})" + b"q\x00h\x00\x86" * 64 + b"Ns.",
        "unhashable key": b"\x80\x02}]Ns.",
        "no end": pickle.dumps(list(range(1000)), 2)[:-1],
        "nothing": b"",
        "noise": np.random.default_rng(0).bytes(4096),
        "empty stack": b"\x80\x020.",
        "unknown memo": b"\x80\x02h\x09.",
        "a text that lies about its length": b"\x80\x02X" + struct.pack("<I", 1 << 31) + b"a.",
    }


# ---- kinds ----
def running(folder: Path) -> Made:
    """Gadgets as the whole file and as each part of a sound one."""
    made = gadgets(str(folder / "marker"))
    for name, pickled in made.items():
        yield name, "", lambda path, pickled=pickled: archive(path, pickled)
    record = torch_file.Record(torch_file.Global("os", "system"), (f"touch {folder / 'marker'}",))
    state = sound_state()
    yield "as the cfg", "", lambda path: sound(path, cfg=record)
    yield "as a tensor", "is no tensor", lambda path: sound(path, state | {WEIGHT: record})
    yield "as the state dict", "", lambda path: sound(path, state_dicts={"ema_model": record})
    yield "as the state dicts", "", lambda path: sound(path, state_dicts=record)
    yield "as the architecture", "", lambda path: sound(path, uva_jax=record)


def truncated(whole: bytes, sections: dict[str, int], said: str) -> Made:
    """The file cut at each of the places."""
    for name, size in sections.items():
        yield name, said if size else "", lambda path, size=size: path.write_bytes(whole[:size])


def sections(path: Path) -> dict[str, int]:
    """Where a cut through each section of a checkpoint would be."""
    size, found = path.stat().st_size, {"nothing": 0, "first header": 20}
    with zipfile.ZipFile(path) as opened:
        entries, contents = torch_file.read(path).archive.entries, opened.start_dir
    for name in ("data.pkl", "byteorder", "data/0", "data/40", "version", ".data/serialization_id"):
        found |= {f"in {name}": entries[name].offset + max(entries[name].size // 2, 1)}
    found |= {"before the contents": contents, "in the contents": (contents + size) // 2}
    return found | {"in the last record": size - 10, "the last byte": size - 1}


def flipped(whole: bytes, places: dict[str, int], said: str) -> Made:
    """The file with one bit changed at each of the places."""
    for name, place in places.items():

        def make(path: Path, place: int = place) -> None:
            data = bytearray(whole)
            data[place] ^= 0x10
            path.write_bytes(data)

        yield name, said, make


def places(path: Path) -> dict[str, int]:
    """One byte of every section whose bytes matter."""
    entries = torch_file.read(path).archive.entries
    with zipfile.ZipFile(path) as opened:
        contents = opened.start_dir
    found = {"first magic number": 1, "magic number of the contents": contents + 1}
    found |= {"a name in the contents": contents + 50, "checksum in the contents": contents + 17}
    found |= {"size in the contents": contents + 21, "place in the contents": contents + 43}
    for part in (8, 4, 2):
        entry = entries["data.pkl"]
        found[f"data.pkl at 1/{part}"] = entry.offset + entry.size // part
    for name in ("data/0", "data/7", "data/40", "data/90", "version", ".data/serialization_id"):
        found[f"middle of {name}"] = entries[name].offset + entries[name].size // 2
    return found


def _changed(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        state = sound_state()
        change(state)
        sound(path, state)

    return make


def shapes() -> Made:
    """Tensors that are missing, foreign, or of another shape."""
    pairs = ("model.encoder_blocks.0.mlp.fc1.weight", "model.encoder_blocks.0.mlp.fc2.weight")

    def swap(state: dict) -> None:
        state[pairs[0]], state[pairs[1]] = state[pairs[1]], state[pairs[0]]

    first = "model.z_proj.bias"
    yield "two weights swapped", "", _changed(swap)
    yield "transposed", "shape", _changed(lambda s: s.update({pairs[0]: s[pairs[0]].T}))
    yield "cut", f"{first} has shape (7,)", _changed(lambda s: s.update({first: s[first][:-1]}))
    yield "empty", f"{first} has shape (0,)", _changed(lambda s: s.update({first: s[first][:0]}))
    yield "scalar", f"{first} has shape ()", _changed(lambda s: s.update({first: s[first][0, ...]}))
    yield "one axis more", "has shape (1, 8)", _changed(lambda s: s.update({first: s[first][None]}))
    yield "missing", f"{first} is missing", _changed(lambda s: s.pop(first))
    yield "unknown", "no rule for model.x", _changed(lambda s: s.update({"model.x": s[first]}))
    yield "no layers", "", _changed(lambda s: [s.pop(n) for n in list(s) if "_blocks." in n])
    yield "no vae", "", _changed(lambda s: [s.pop(n) for n in list(s) if n.startswith("vae")])
    far = "model.encoder_blocks.99999999.norm1.weight"
    yield "layer 99999999", "", _changed(lambda s: s.update({far: s[first]}))


def weights() -> Made:
    """Values that are not finite or too precise, and dtypes that are no weights."""
    bad = {"NaN": np.nan, "infinite": np.inf, "minus infinite": -np.inf}
    for name, value in bad.items():

        def change(state: dict, value: float = value) -> None:
            state[WEIGHT][1, 1] = value

        yield name, f"{WEIGHT} has 1 of 16 values that are not finite", _changed(change)
    for dtype in (ml_dtypes.bfloat16, np.float16, np.float64):

        def change(state: dict, dtype=dtype) -> None:
            state[WEIGHT] = np.full((8, 2), np.nan, dtype)

        said = f"{WEIGHT} has 16 of 16 values that are not finite"
        yield f"NaN in {np.dtype(dtype)}", said, _changed(change)
    scale = "normalizer.params_dict.action.scale"
    said = f"{scale} has 2 of 2 values"
    yield "NaN in the normaliser", said, _changed(lambda s: s[scale].fill(np.nan))
    large = {WEIGHT: np.full((8, 2), 1e300)}
    yield "beyond float32", f"{WEIGHT} has 16 of 16 values", _changed(lambda s: s.update(large))
    exact = {WEIGHT: np.full((8, 2), 1 / 3)}
    yield "beyond float32's digits", f"{WEIGHT} is float64", _changed(lambda s: s.update(exact))
    for dtype in (np.int64, np.bool_, np.complex64):
        change = {WEIGHT: np.zeros((8, 2), dtype)}
        said = f"{WEIGHT} has dtype {np.dtype(dtype)}"
        yield str(np.dtype(dtype)), said, _changed(lambda s, change=change: s.update(change))


def zip_tricks(whole: bytes) -> Made:
    """Names, sizes and methods that torch.save never writes."""
    good = pickle.dumps({}, 2)
    names = {
        "up": "!../evil",
        "up from the folder": "data/../../evil",
        "absolute": "!/etc/passwd",
        "backslashes": "data\\..\\evil",
        "drive": "!C:\\evil",
        "long name": "data/" + "a" * 600,
    }
    for name, entry in names.items():
        yield name, "outside", lambda path, e=entry: archive(path, good, [(e, b"")])
    twice = {"data.pkl twice": "data.pkl", "byteorder twice": "byteorder"}
    for name, entry in twice.items():
        yield name, "two entries named", lambda path, e=entry: archive(path, good, [(e, good)])
    yield "two folders", "no single", lambda path: archive(path, good, [("!b/data.pkl", good)])
    yield "TorchScript", "TorchScript", lambda path: archive(path, good, [("constants.pkl", good)])
    yield "big-endian", "big-endian", lambda path: archive(path, good, byteorder=b"big")
    options = {"compression": zipfile.ZIP_DEFLATED}
    yield "bomb in data.pkl", "packed", lambda path: archive(path, bytes(20 << 20), **options)
    bomb = [("data/0", bytes(20 << 20))]
    yield "bomb in a tensor", "packed", lambda path: archive(path, good, bomb, **options)

    def boast(path: Path) -> None:  # the sizes of an entry are raised far beyond the file's
        archive(path, good, [("data/0", b"1234")])
        data = bytearray(path.read_bytes())
        at = data.rindex(b"PK\1\2", 0, data.rindex(b"archive/data/0")) + 20
        data[at : at + 8] = struct.pack("<II", 1 << 30, 1 << 30)
        path.write_bytes(data)

    yield "bomb without data", "no room", boast
    yield "contents only", "", lambda path: path.write_bytes(b"PK\5\6" + bytes(18))
    yield "zip in front of noise", "", lambda path: path.write_bytes(whole + b"x" * 70_000)


def other_formats() -> Made:
    """Files that are no checkpoints of today."""
    tar = b"storages".ljust(257, b"\0") + b"ustar\x00".ljust(255)
    contents = {
        "web page": b"\n<!DOCTYPE html><html></html>",
        "git-LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "tar": tar,
        "old PyTorch": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.",
        "bare pickle": pickle.dumps({"a": 1}, 2),
        "text": b"hello",
        "zeros": bytes(4096),
        "gzip": b"\x1f\x8b\x08" + bytes(100),
        "safetensors by another name": struct.pack("<Q", 2) + b"{}" + bytes(8),
    }
    for name, content in contents.items():
        yield name, "", lambda path, content=content: path.write_bytes(content)


def with_cfg(changes: dict[str, object]) -> Callable[[Path], object]:
    """A checkpoint whose cfg says other values of some keys ("a.b.c")."""
    values = plain_cfg(CONFIG)
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return lambda path: sound(path, cfg=torch_file.records_from_dict(values))


_PARAMS = "model.policy.autoregressive_model_params"
SENSELESS = {  # key of the cfg -> values that make no sense
    "model.policy.n_action_steps": (0, 32, -1, 8.5, "eight", True),
    "model.policy.shift_action": ("None", 2),
    "model.policy.different_history_freq": ("false",),
    "model.policy.action_mask_ratio": (-0.1, 1.5),
    "model.policy.selected_training_mode": ("policy",),
    "model.policy.action_model_params.act_model_type": ("conv3",),
    f"{_PARAMS}.act_diff_testing_steps": ("0", "2000", "-5", "ten", "ddim400", 0),
    f"{_PARAMS}.num_sampling_steps": ("0", "2000", [100]),
    f"{_PARAMS}.act_diff_training_steps": (0, -1000, 10**9, "many"),
    f"{_PARAMS}.num_iter": (0, -1, 5, 1.5),
    f"{_PARAMS}.temperature": (-1.0, float("nan"), float("inf"), "hot"),
    f"{_PARAMS}.cfg": (-1.0, float("nan")),
    f"{_PARAMS}.cfg_schedule": ("cosine",),
    f"{_PARAMS}.patch_size": (0, 2, -1),
    f"{_PARAMS}.attn_dropout": (1.0, -0.5),
    f"{_PARAMS}.mask_ratio_min": (1.0, 7),
    f"{_PARAMS}.label_drop_prob": (2,),
    "task.env_runner.n_obs_steps": (0, -16, 2, 15, "all"),
    "task.dataset.horizon": (0, -1, 16, 31, 2.5),
    "task.dataset.normalizer_type": ("range",),
    "task.task_modes": (["policy"], "policy_model"),
}
UNRESOLVED = {  # key of the cfg -> what leads nowhere
    "model.policy.n_action_steps": "${eval:'__import__(\"os\").getpid()'}",
    f"{_PARAMS}.num_iter": "${oc.env:ROUNDS}",
    f"{_PARAMS}.temperature": "${nowhere.temperature}",
    "task.dataset.normalizer_type": "???",
    "task.name": "${now:%Y}_pusht",
}


def settings() -> Made:
    """Values of the cfg with which no policy could act or be trained on."""
    for key, values in SENSELESS.items():
        for value in values:
            yield f"{key} = {value!r}", f"cfg says {key} is ", with_cfg({key: value})
    for key, value in UNRESOLVED.items():
        said = f"holds an unresolved {value} at {key}"
        yield f"{key} unresolved", said, with_cfg({key: value})


def normalisers() -> Made:
    """Normalisers with which no action could be told."""
    prefix = "normalizer.params_dict.action."
    scale = f"{prefix}scale"

    def wide(width: int) -> Callable[[dict], None]:
        return lambda s: s.update(
            {n: np.ones(width, np.float32) for n in list(s) if n.startswith(prefix)}
        )

    def remove(start: str) -> Callable[[dict], None]:
        return lambda s: [s.pop(n) for n in list(s) if n.startswith(start)]

    none = f"no normaliser of 'action' ({prefix}*)"
    yield "missing", none, _changed(remove("normalizer."))
    silent = plain_cfg(CONFIG)
    del silent["task"]["dataset"]["normalizer_type"]
    bare = {n: v for n, v in sound_state().items() if not n.startswith("normalizer.")}
    cfg = torch_file.records_from_dict(silent)
    yield "missing, and not said in the cfg", none, lambda path: sound(path, bare, cfg=cfg)
    yield (
        "of another field",
        none,
        _changed(
            lambda s: s.update(
                {n.replace("action", "image"): s.pop(n) for n in list(s) if "er.pa" in n}
            )
        ),
    )
    for width in (1, 3, 0):
        said = f"normaliser of 'action' is {width} numbers wide" if width else "has shape (0,)"
        yield f"width {width}", said, _changed(wide(width))
    yield "no scale", none, _changed(remove(scale))
    yield "no offset", f"{prefix}offset is missing", _changed(remove(f"{prefix}offset"))
    for value, said in (
        (0.0, "'action' has scale 0 (column 1)"),
        (-0.0, "has scale 0"),
        (1e-40, "has scale 0"),
        (np.inf, ""),
    ):

        def change(state: dict, value: float = value) -> None:
            state[scale][1] = value

        yield f"scale {value}", said or f"{scale} has 1 of 2 values that are not", _changed(change)
    offset = f"{prefix}offset"
    bad = {offset: np.array([0, np.nan], np.float32)}
    yield "offset NaN", f"{offset} has 1 of 2 values", _changed(lambda s: s.update(bad))


def configurations() -> Made:
    """Architectures and cfgs that make no sense, or would cost endless time."""

    def described(**changes: object) -> str:
        values = description.describe(CONFIG, {})["policy"]
        for path, value in changes.items():
            *parents, last = path.split("__")
            node = values
            for parent in parents:
                node = node[parent]
            node[last] = value
        return json.dumps({"policy": values})

    stored = {
        "no json": "{",
        "json of something else": "[1, 2]",
        "endless json": "[" * 100_000,
        "unknown field": described(mar__evil=1),
        "a billion layers": described(mar__encoder_depth=10**9),
        "a billion blocks": described(action_head__depth=10**9),
        "negative width": described(mar__encoder_embed_dim=-8),
        "width 0": described(mar__decoder_embed_dim=0),
        "width 2**62": described(mar__encoder_embed_dim=2**62),
        "no heads": described(mar__encoder_num_heads=0),
        "text for a number": described(image_size="evil"),
        "unknown aggregator": described(action_head__aggregator="evil"),
    }
    for name, value in stored.items():
        yield name, "", lambda path, value=value: sound(path, uva_jax=value)

    params = "model.policy.autoregressive_model_params"
    yield "patch size is a text", "patch_size is 'evil'", with_cfg({f"{params}.patch_size": "evil"})
    yield "another image size", "img_size", with_cfg({f"{params}.img_size": 64})
    bomb = {f"a{i}": f"${{a{i + 1}}}${{a{i + 1}}}" for i in range(60)} | {"a60": "x"}
    made = torch_file.records_from_dict(bomb)
    yield "doubling interpolations", "", lambda path: sound(path, cfg=made)
    loop: dict = {}
    loop["again"] = loop
    yield "a cfg that holds itself", "", lambda path: archive(path, pickle.dumps({"cfg": loop}, 2))
    both = sound_state() | {f"module.{WEIGHT}": sound_state()[WEIGHT]}
    yield "a name twice, once as module.", "twice, as", lambda path: sound(path, both)
