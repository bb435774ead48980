#!/usr/bin/env python3
"""Turns a pickled checkpoint of the published Mixture-of-Logits code into a model directory.

  convert_mol_checkpoint.py CHECKPOINT OUT_DIR [--temperature 0.05] [--query-nonlinearity swiglu] ...

CHECKPOINT is what torch.save wrote: {"model_state_dict": ...} or the state dict itself. OUT_DIR gets config.json and
model.safetensors, which `trireme retrieve --model` reads, and item_embeddings.safetensors when the checkpoint holds
them (row 0, the padding, left out; ids from 1 on). Sizes follow from the shapes; what no shape tells is an option. Needs
Python alone: the file is read without torch, and nothing in it is executed.
"""
import argparse
import collections
import io
import json
import math
import os
import pickle
import sys
import zipfile

DTYPES = {"FloatStorage": ("F32", 4), "HalfStorage": ("F16", 2), "BFloat16Storage": ("BF16", 2)}
PREFIX = "module._ndp_module."
ITEMS = "_embedding_module._item_emb.weight"


def fail(message):
    sys.exit("convert_mol_checkpoint.py: " + message)


class Ignored:
    """Stands for every object that is no tensor: optimizer state, configurations."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __call__(self, *args, **kwargs):
        return Ignored()


Tensor = collections.namedtuple("Tensor", "dtype shape data")


class Reader(pickle.Unpickler):
    def __init__(self, archive, folder):
        super().__init__(io.BytesIO(archive.read(folder + "/data.pkl")))
        self.archive, self.folder = archive, folder

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if module == "torch" and name.endswith("Storage"):
            return name
        return Ignored

    def persistent_load(self, saved):
        return saved[1], self.folder + "/data/" + saved[2]  # storage type and file

    def tensor(self, storage, offset, shape, stride, *_):
        kind, file = storage
        if kind not in DTYPES:
            return None  # integers: counters of the optimizer
        dtype, size = DTYPES[kind]
        dense, step = True, 1
        for length, jump in zip(reversed(shape), reversed(stride)):
            dense = dense and (length == 1 or jump == step)
            step *= length
        if not dense:
            fail("a tensor of shape %s is not contiguous; save a contiguous copy" % (tuple(shape),))
        data = self.archive.read(file)[offset * size:(offset + math.prod(shape)) * size]
        if len(data) != math.prod(shape) * size:
            fail("a tensor of shape %s has %d bytes of %d: the checkpoint is cut short" %
                 (tuple(shape), len(data), math.prod(shape) * size))
        return Tensor(dtype, list(shape), data)


def read_state(path):
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        fail("%s: is no checkpoint of torch.save in its zip format (%s)" % (path, error))
    folders = [name[:-len("/data.pkl")] for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(folders) != 1:
        fail("%s: holds no data.pkl" % path)
    try:
        state = Reader(archive, folders[0]).load()
    except Exception as error:  # whatever a broken pickle leads to
        fail("%s: cannot be read: %s" % (path, error))
    state = state.get("model_state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict):
        fail("%s: holds no state dict" % path)
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def own_name(key):
    for prefix in (PREFIX, "module.", ""):
        if key.startswith(prefix):
            key = key[len(prefix):]
            break
    old = "_item_proj_module."
    return "_item_embeddings_fn._item_emb_proj_module." + key[len(old):] if key.startswith(old) else key


def config_of(weights, options):
    def shape(key):
        if key not in weights:
            fail("the checkpoint has no %s" % key)
        return weights[key].shape

    gate = "_gating_fn._%s_partial_module.%s.weight"
    query, item = "_query_embeddings_fn._query_emb_proj_module.", "_item_embeddings_fn._item_emb_proj_module."
    query_glu, item_glu = query + "1._w" in weights, item + "1._w" in weights
    projected = shape(query + ("2.weight" if query_glu else "1.weight"))[0]
    held = shape(item + ("2.weight" if item_glu else "1.weight"))[0]
    tables = []
    while "_query_embeddings_fn._uid_embeddings_%d.weight" % len(tables) in weights:
        tables.append(shape("_query_embeddings_fn._uid_embeddings_%d.weight" % len(tables)))
    logits = shape(gate % ("query_only", 2))[0]
    # L = (projected / d + tables) * held / d.
    sizes = [d for d in range(1, held + 1) if held % d == 0 and projected % d == 0 and
             (projected // d + len(tables)) * (held // d) == logits and all(t[1] == d for t in tables)]
    if len(sizes) != 1:
        fail("the shapes do not tell the component size: %s would fit" % (sizes or "none"))
    d = sizes[0]
    two = gate % ("qi", 3) in weights
    return {
        "model_type": "mol",
        "query_dim": shape(gate % ("query_only", 0))[1], "item_dim": shape(gate % ("item_only", 1))[1],
        "query_components": projected // d + len(tables), "item_components": held // d, "component_dim": d,
        "query_hidden": shape(query + "1._w")[1] // 2 if query_glu else 0,
        "item_hidden": shape(item + "1._w")[1] // 2 if item_glu else 0,
        "query_nonlinearity": options.query_nonlinearity, "item_nonlinearity": options.item_nonlinearity,
        "uid_hash_sizes": [t[0] - 1 for t in tables],
        "l2_norm": not options.no_l2_norm, "eps": options.eps, "temperature": options.temperature,
        "pairing": "all", "gating": "glu_silu",
        "gating_query_hidden": shape(gate % ("query_only", 0))[0],
        "gating_item_hidden": shape(gate % ("item_only", 1))[0],
        "gating_qi_hidden": shape(gate % ("qi", 1))[0] if two else 0,
    }


def write_safetensors(path, tensors):
    header, offset = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape,
                        "data_offsets": [offset, offset + len(tensor.data)]}
        offset += len(tensor.data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path + ".partial", "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            out.write(tensor.data)
    os.replace(path + ".partial", path)


def write_model(out_dir, config, weights, table):
    os.makedirs(out_dir, exist_ok=True)
    write_safetensors(os.path.join(out_dir, "model.safetensors"), weights)
    with open(os.path.join(out_dir, "config.json"), "w") as out:
        out.write(json.dumps(config, indent=2) + "\n")
    if table is not None:
        rows, dim = table.shape
        row_bytes = len(table.data) // rows
        ids = b"".join(i.to_bytes(8, "little") for i in range(1, rows))
        write_safetensors(os.path.join(out_dir, "item_embeddings.safetensors"),
                          {"item_embeddings": Tensor(table.dtype, [rows - 1, dim], table.data[row_bytes:]),
                           "item_ids": Tensor("I64", [rows - 1], ids)})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("out_dir")
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--eps", type=float, default=1e-6)
    parser.add_argument("--no-l2-norm", action="store_true")
    parser.add_argument("--query-nonlinearity", choices=("geglu", "swiglu"), default="swiglu")
    parser.add_argument("--item-nonlinearity", choices=("geglu", "swiglu"), default="swiglu")
    options = parser.parse_args()
    for name in ("temperature", "eps"):
        if not 1e-30 <= getattr(options, name) <= 1e30:
            parser.error("--%s: must be a positive number" % name)

    state = {own_name(key): value for key, value in read_state(options.checkpoint).items()}
    parts = ("_query_embeddings_fn.", "_item_embeddings_fn.", "_gating_fn.")
    weights = {key: value for key, value in state.items() if key.startswith(parts)}
    config = config_of(weights, options)
    try:
        write_model(options.out_dir, config, weights, state.get(ITEMS))
    except OSError as error:
        fail("%s: cannot be written: %s" % (options.out_dir, error.strerror))
    print(options.out_dir)


if __name__ == "__main__":
    main()
