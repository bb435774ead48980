"""Writes runtime/nfc_table.cc from Python's own Unicode data: python3 make_nfc_table.py > nfc_table.cc"""
import sys
import unicodedata


def rows(name, kind, entries):
    cells = ["{%s}," % ", ".join(entry) for entry in entries]
    print(f"const {kind} {name}[] = {{")
    line = "   "
    for cell in cells:
        if len(line) + 1 + len(cell) > 100:
            print(line)
            line = "   "
        line += " " + cell
    print(line)
    print(f"}};\nconst size_t {name}Size = std::size({name});\n")


composing, only, ranges = [], [], []
for cp in range(sys.maxunicode + 1):
    char = chr(cp)
    text = unicodedata.decomposition(char)
    if text and not text.startswith("<"):
        parts = [int(p, 16) for p in text.split()] + [0]
        stable = unicodedata.normalize("NFC", char) == char and parts[1] != 0
        (composing if stable else only).append([f"0x{v:X}" for v in (cp, parts[0], parts[1])])
    combining = unicodedata.combining(char)
    if combining:
        if ranges and ranges[-1][1] == cp - 1 and ranges[-1][2] == combining:
            ranges[-1][1] = cp
        else:
            ranges.append([cp, cp, combining])

print('#include "runtime/nfc_table.h"\n\n#include <iterator>\n\n// clang-format off\nnamespace trireme::nfc_table {\n')
rows("kComposing", "Decomposition", composing)
rows("kDecomposingOnly", "Decomposition", only)
rows("kCombining", "CombiningRange", [[f"0x{a:X}", f"0x{b:X}", str(c)] for a, b, c in ranges])
print("}  // namespace trireme::nfc_table")
