"""Bytes and maps of them with something wrong, for fuzzing with hypothesis."""

from hypothesis import strategies as st


@st.composite
def spoilt_bytes(draw, data):
    """Bytes like these, with something wrong; by chance the same."""
    how = draw(st.sampled_from(["other", "flipped", "cut", "longer", "swapped"]))
    if how == "other" or not data:
        return draw(st.binary(max_size=200))
    # not by the length of these very bytes: keys and numbers differ from one example to its repetition
    at = draw(st.integers(0, 10**6)) % len(data)
    if how == "flipped":
        return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
    if how == "cut":
        return data[:at]
    if how == "longer":
        return data[:at] + draw(st.binary(min_size=1, max_size=40)) + data[at:]
    other = draw(st.integers(0, 10**6)) % len(data)
    return data[:at] + data[other : other + 8] + data[at + 8 :]


@st.composite
def spoilt_map(draw, values, names, spoilt=spoilt_bytes, most=3):
    """Values by name like these, up to `most` of them left out, altered by `spoilt`, exchanged or of somebody else."""
    changed = dict(values)
    for _ in range(draw(st.integers(0, most))):
        how = draw(st.sampled_from(["left out", "altered", "exchanged", "somebody"]))
        name = draw(st.sampled_from(sorted(values)))
        if how == "left out":
            changed.pop(name, None)
        elif how == "altered":
            changed[name] = draw(spoilt(values[name]))
        elif how == "exchanged":
            changed[name] = values[draw(st.sampled_from(sorted(values)))]
        else:
            changed[draw(st.text(max_size=10) | st.sampled_from(names))] = values[name]
    return changed
