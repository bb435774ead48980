#!/usr/bin/env python3
"""Writes the weights of a golden file the way torch.save does, without torch: what convert_mol_checkpoint.py must read.

  make_torch_checkpoint.py GOLDEN.safetensors OUT.pt
"""
import collections
import io
import json
import pickle
import sys
import types
import zipfile


def stand_in(module, name):
    cls = type(name, (), {})
    cls.__module__ = module
    sys.modules.setdefault(module, types.ModuleType(module))
    setattr(sys.modules[module], name, cls)
    return cls


FloatStorage = stand_in("torch", "FloatStorage")
rebuild_tensor = stand_in("torch._utils", "_rebuild_tensor_v2")


class Storage:
    def __init__(self, key, count):
        self.key, self.count = key, count


class Tensor:
    def __init__(self, storage, shape):
        self.storage, self.shape = storage, shape

    def __reduce__(self):
        stride, step = [], 1
        for length in reversed(self.shape):
            stride.insert(0, step)
            step *= length
        return rebuild_tensor, (self.storage, 0, tuple(self.shape), tuple(stride), False, collections.OrderedDict())


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return ("storage", FloatStorage, value.key, "cpu", value.count) if isinstance(value, Storage) else None


def main():
    source, target = sys.argv[1:]
    raw = open(source, "rb").read()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + length])
    header.pop("__metadata__")
    state = collections.OrderedDict()
    with zipfile.ZipFile(target, "w") as archive:
        for name, entry in header.items():
            if not name.startswith("model."):
                continue
            begin, end = entry["data_offsets"]
            key = str(len(state))
            archive.writestr("archive/data/" + key, raw[8 + length + begin:8 + length + end])
            state["module._ndp_module." + name[6:]] = Tensor(Storage(key, (end - begin) // 4), entry["shape"])
        out = io.BytesIO()
        Pickler(out, protocol=2).dump({"epoch": 3, "model_state_dict": state})
        archive.writestr("archive/data.pkl", out.getvalue())


if __name__ == "__main__":
    main()
