"""A secure sum's cost: one lender's and the coordinator's, next to the masks alone and to Flower's primitives.

CPU time of one process and thread, medians over the turns; every turn runs a whole sum, then the bounds, then (at
10 lenders) Flower's primitives, so that what the machine does besides falls on all of them.

- A lender's time is all it does in a sum: encoding a vector of float32, the six steps, the hash of a question as
  large as the vector. The coordinator's is all it does: checks of every message, adding up, unmasking, decoding.
- The bound is the time to expand and add as many keystreams as the protocol has masks: n at a lender, and at the
  coordinator one for each survivor, and one for each pair of a survivor and a dropped lender. It holds the masks and
  nothing else; `over_bound` in figures and rows is against it.
- The floor (`over_floor` in the rows) is the bound and what else is m long and no protocol saves. Both sides: one
  SHA-256 of the question, since masks are bound to what is asked. The coordinator: reading every survivor's vector
  from memory and adding it up. Where few masks are left, with few lenders or at a coordinator that nobody dropped
  out on, these are as much as the masks are, so there the bound alone says little of how much is wasted. Signatures,
  key exchanges, shares, encoding and decoding are in neither.
- The counter-mode bound (`over_ctr` in the rows) is the bound with keystreams from AES's plain counter mode, the usual
  way to make them. Our masks take the same kind of stream from GCM's wider code, and so does the bound.
- Flower's are the functions of SecAgg+ on a complete graph (`flwr.common.secure_aggregation`, as its client mod and
  its workflow call them), without serialisation. Its workflow checks no message; it adds up, recovers secrets,
  unmasks and decodes. `flwr_over_ours` sets that beside the same work here ("sum" in the rows); beside all that our
  coordinator does stands `flwr_over_everything`. A lender's work is whole on both sides.

The figures are those with a tenth of the lenders dropped out after they shared; rows show the others as well.
With --memory only the coordinator's peak memory for 100 lenders and 10 million parameters is measured.
"""

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from flwr.common.secure_aggregation import ndarrays_arithmetic as arithmetic
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.quantization import dequantize, quantize
from flwr.common.secure_aggregation.secaggplus_utils import (
    pseudo_rand_gen,
    share_keys_plaintext_concat,
    share_keys_plaintext_separate,
)
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)
from machine import document, print_document
from numpy.typing import NDArray

from fedfin.privacy.combiner import Combiner
from fedfin.privacy.encoding import Layout, Segment
from fedfin.privacy.masks import BLOCK_WORDS
from fedfin.privacy.participant import Participant
from fedfin.privacy.sum_context import SumContext, roster_digest, threshold_of

CASES = ((10, 10_000), (10, 1_000_000), (10, 10_000_000), (30, 10_000), (30, 1_000_000), (100, 10_000))
LARGEST = (100, 1_000_000)
FLOWER = (10, 1_000_000)
PARTIES = ("client", "server")
VECTORS_BYTES = 64 * 2**20  # so many different vectors are added up in the floor: no cache holds them
FLOWER_CLIPPING, FLOWER_TARGET, FLOWER_MODULUS = 8.0, 2**22, 2**32
IDENTITIES = {f"bank-{number:03}": Ed25519PrivateKey.generate() for number in range(100)}


class Clock:
    """CPU seconds of one party, added up over its calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, call: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401  (whatever is called)
        """Return what `call` returns, and add its time."""
        start = time.process_time()
        result = call(*arguments)
        self.seconds += time.process_time() - start
        return result


@dataclass(frozen=True)
class Case:
    """One size of a sum.

    Attributes:
        num_lenders: n.
        size: m.
        num_dropped: Lenders that share and then send no vector.
    """

    num_lenders: int
    size: int
    num_dropped: int

    @property
    def num_masks(self) -> int:
        """Masks that the coordinator takes off."""
        return self.num_survivors + self.num_dropped * self.num_survivors

    @property
    def num_survivors(self) -> int:
        """Lenders whose vectors are summed."""
        return self.num_lenders - self.num_dropped


def new_sum(case: Case) -> tuple[dict[str, Participant], Combiner, Layout]:
    """Return the parties of one sum and its layout."""
    names = tuple(sorted(IDENTITIES)[: case.num_lenders])
    roster = {name: IDENTITIES[name].public_key() for name in names}
    step = 1.0 / ((2**31 - 1) // case.num_lenders)  # the finest that cannot wrap
    layout = Layout((Segment("update", case.size, 1.0, step),), case.num_lenders)
    context = SumContext(
        federation="benchmark",
        job_id="job",
        plan="0" * 64,
        stage="round 1",
        attempt=0,
        cohort=names,
        roster=roster_digest(roster),
        layout=layout.digest(),
        threshold=threshold_of(case.num_lenders),
    )
    participants = {name: Participant(context, name, IDENTITIES[name], roster, 3) for name in names}
    return participants, Combiner(context, roster, case.size), layout


def our_times(case: Case, values: NDArray[np.float32], question: bytes) -> dict[str, float]:
    """Return CPU seconds of one lender (the median of those that finish) and of the coordinator, for a whole sum."""
    participants, combiner, layout = new_sum(case)
    server, summing, clocks = Clock(), Clock(), {name: Clock() for name in participants}
    for name, one in participants.items():
        server(combiner.add_advert, name, clocks[name](one.open))
    adverts = server(combiner.adverts)
    for name, one in participants.items():
        server(combiner.add_sealed, name, clocks[name](one.share, adverts))
    server(combiner.ask, question)
    survivors = list(participants)[case.num_dropped :]
    for name in survivors:
        one, clock = participants[name], clocks[name]
        clock(one.receive, server(combiner.sealed_for, name), question)
        summing(combiner.fold, name, clock(one.mask, clock(layout.encode, {"update": values})))
    settled = server(combiner.settle)
    for name in survivors:
        server(combiner.add_confirmation, name, clocks[name](participants[name].confirm, settled))
    confirmations = server(combiner.confirmations)
    for name in survivors:
        server(combiner.add_shares, name, clocks[name](participants[name].unmask, confirmations))
    decoded = summing(layout.decode, summing(combiner.total))["update"]
    worst = np.abs(decoded - len(survivors) * values.astype(np.float64).clip(-1, 1)).max()
    if worst > len(survivors) * layout.segments[0].step:
        msg = f"the sum is wrong by {worst}"
        raise ValueError(msg)
    return {
        "client": statistics.median(clocks[name].seconds for name in survivors),
        "server": server.seconds + summing.seconds,
        "sum": summing.seconds,
    }


def bound_time(num_masks: int, size: int) -> float:
    """Return CPU seconds to make so many keystreams and add them, in blocks that stay in the cache."""
    encrypt, nonce = AESGCM(os.urandom(32)).encrypt_into, bytes(12)
    room, zeros = bytearray(4 * BLOCK_WORDS + 16), bytes(4 * BLOCK_WORDS)
    words = np.frombuffer(room, dtype=np.uint32, count=BLOCK_WORDS)
    block = np.zeros(BLOCK_WORDS, np.uint32)
    whole, rest = divmod(num_masks * size, BLOCK_WORDS)
    start = time.process_time()
    for _ in range(whole):
        encrypt(nonce, zeros, None, room)
        np.add(block, words, out=block)
    encrypt(nonce, zeros[: 4 * rest], None, room[: 4 * rest + 16])
    return time.process_time() - start


def counter_mode_time(num_masks: int, size: int) -> float:
    """Return CPU seconds as `bound_time`, the keystreams from plain counter mode."""
    stream = Cipher(AES(os.urandom(32)), CTR(bytes(16))).encryptor()
    room, zeros = bytearray(4 * BLOCK_WORDS + 16), bytes(4 * BLOCK_WORDS)
    words = np.frombuffer(room, dtype=np.uint32, count=BLOCK_WORDS)
    block = np.zeros(BLOCK_WORDS, np.uint32)
    start = time.process_time()
    for _ in range(num_masks * size // BLOCK_WORDS):
        stream.update_into(zeros, room)
        np.add(block, words, out=block)
    return time.process_time() - start


def hash_time(question: bytes) -> float:
    """Return CPU seconds to hash the question once."""
    start = time.process_time()
    hashlib.sha256(question).digest()
    return time.process_time() - start


def adding_time(num_vectors: int, vectors: list[NDArray[np.uint32]]) -> float:
    """Return CPU seconds to add so many vectors to a sum, each of them from memory: those given, in turns."""
    total = vectors[0].copy()
    start = time.process_time()
    for number in range(num_vectors):
        np.add(total, vectors[number % len(vectors)], out=total)
    return time.process_time() - start


def flower_times(case: Case, values: NDArray[np.float32]) -> tuple[float, float]:
    """Return CPU seconds of one lender and of the coordinator, by Flower's primitives for the same sum."""
    num, threshold, shape = case.num_lenders, threshold_of(case.num_lenders), [(), values.shape]
    # what the others send is made beforehand: one lender is timed
    mask_keys, channel_keys = ([generate_key_pairs() for _ in range(num)] for _ in range(2))
    public_keys = [[public_key_to_bytes(pair[1]) for pair in pairs] for pairs in (mask_keys, channel_keys)]
    from_others = [
        encrypt(generate_shared_key(channel_keys[peer][0], channel_keys[0][1]), bytes(200))
        for peer in range(num)
    ]
    lender = Clock()
    masked = lender(_flower_lender, public_keys, mask_keys[0][0], channel_keys[0][0], from_others, values)
    survivors = range(case.num_dropped, num)
    seeds = {peer: os.urandom(32) for peer in survivors}
    shares = {
        peer: create_shares(
            seeds[peer] if peer in seeds else private_key_to_bytes(mask_keys[peer][0]), threshold, num
        )
        for peer in range(num)
    }
    # its workflow combines the shares of everybody who answered, not of the threshold's number
    given_back = {owner: [those[peer] for peer in survivors] for owner, those in shares.items()}
    server = Clock()
    server(_flower_coordinator, masked, survivors, given_back, public_keys[0], shape)
    return lender.seconds, server.seconds


def _flower_lender(
    public_keys: list[list[bytes]],
    mask_key: Any,  # noqa: ANN401  (Flower's key)
    channel_key: Any,  # noqa: ANN401
    sealed: list[bytes],
    values: NDArray[np.float32],
) -> list[NDArray[Any]]:
    """What `flwr.client.mod.secure_aggregation.secaggplus_mod` does in its four stages, lender 0 of them."""
    num, me = len(public_keys[0]), 0
    generate_key_pairs(), generate_key_pairs()
    seed = os.urandom(32)
    shares = [
        create_shares(secret, threshold_of(num), num) for secret in (seed, private_key_to_bytes(mask_key))
    ]
    channels = {
        peer: generate_shared_key(channel_key, bytes_to_public_key(public_keys[1][peer]))
        for peer in range(1, num)
    }
    for peer, channel in channels.items():
        encrypt(channel, share_keys_plaintext_concat(me, peer, shares[0][peer], shares[1][peer]))
    for peer, channel in channels.items():
        share_keys_plaintext_separate(decrypt(channel, sealed[peer]))
    quantized = quantize(arithmetic.parameters_multiply([values], 0.5), FLOWER_CLIPPING, FLOWER_TARGET)
    vector = arithmetic.factor_combine(FLOWER_TARGET // 2, quantized)
    shapes = arithmetic.get_parameters_shape(vector)
    vector = arithmetic.parameters_addition(vector, pseudo_rand_gen(seed, FLOWER_MODULUS, shapes))
    for peer in range(1, num):
        shared = generate_shared_key(mask_key, bytes_to_public_key(public_keys[0][peer]))
        vector = arithmetic.parameters_subtraction(vector, pseudo_rand_gen(shared, FLOWER_MODULUS, shapes))
    return arithmetic.parameters_mod(vector, FLOWER_MODULUS)


def _flower_coordinator(
    masked: list[NDArray[Any]],
    survivors: range,
    shares: dict[int, list[bytes]],
    mask_keys: list[bytes],
    shapes: list[tuple[int, ...]],
) -> list[NDArray[Any]]:
    """What `flwr.server.workflow.secure_aggregation.secaggplus_workflow` does from the first vector on."""
    total = masked
    for _ in survivors[1:]:
        total = arithmetic.parameters_addition(total, masked)
    total = arithmetic.parameters_mod(total, FLOWER_MODULUS)
    for owner, given in shares.items():
        secret = combine_shares(given)
        if owner in survivors:
            total = arithmetic.parameters_subtraction(total, pseudo_rand_gen(secret, FLOWER_MODULUS, shapes))
            continue
        # its workflow goes through every neighbour, the other dropped ones too
        for peer in (peer for peer in shares if peer != owner):
            shared = generate_shared_key(bytes_to_private_key(secret), bytes_to_public_key(mask_keys[peer]))
            total = arithmetic.parameters_addition(total, pseudo_rand_gen(shared, FLOWER_MODULUS, shapes))
    total = arithmetic.parameters_mod(total, FLOWER_MODULUS)
    _, vector = arithmetic.factor_extract(total)
    return dequantize(vector, FLOWER_CLIPPING, FLOWER_TARGET)


def measure(case: Case, turns: int, *, with_flower: bool) -> dict[str, list[float]]:
    """Return CPU seconds by what was timed, one for each turn."""
    values = np.random.default_rng(0).normal(scale=0.3, size=case.size).astype(np.float32)
    question = values.tobytes()
    times: dict[str, list[float]] = {}
    vectors = [np.ones(case.size, np.uint32) for _ in range(-(-VECTORS_BYTES // (4 * case.size)))]
    for _ in range(turns):
        turn = our_times(case, values, question) | {
            "client_bound": bound_time(case.num_lenders, case.size),
            "server_bound": bound_time(case.num_masks, case.size),
            "client_ctr": counter_mode_time(case.num_lenders, case.size),
            "server_ctr": counter_mode_time(case.num_masks, case.size),
        }
        hashing = hash_time(question)
        turn["client_floor"] = turn["client_bound"] + hashing
        turn["server_floor"] = turn["server_bound"] + hashing + adding_time(case.num_survivors, vectors)
        if with_flower:
            turn["flower_client"], turn["flower_server"] = flower_times(case, values)
        for name, seconds in turn.items():
            times.setdefault(name, []).append(seconds)
    return times


def peak_memory_mib() -> float:
    """Return the coordinator's peak memory above what it held before, 100 lenders and 10 million parameters, in MiB."""
    command = [sys.executable, str(Path(__file__)), "--memory-here"]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))


def measure_memory() -> float:
    """The body of that process: vectors arrive one at a time, as arrays that are not kept."""
    case = Case(100, 10_000_000, 10)
    question = bytes(4 * case.size)
    participants, combiner, layout = new_sum(case)
    before = _resident_mib("VmRSS")
    for name, one in participants.items():
        combiner.add_advert(name, one.open())
    adverts = combiner.adverts()
    for name, one in participants.items():
        combiner.add_sealed(name, one.share(adverts))
    combiner.ask(question)
    survivors = list(participants)[case.num_dropped :]
    for name in survivors:
        participants[name].receive(combiner.sealed_for(name), question)
        participants[name].mask(np.zeros(1, np.uint32))
        combiner.fold(name, np.ones(case.size, np.uint32))
    settled = combiner.settle()
    for name in survivors:
        combiner.add_confirmation(name, participants[name].confirm(settled))
    for name in survivors:
        combiner.add_shares(name, participants[name].unmask(combiner.confirmations()))
    layout.decode(combiner.total(threads=len(os.sched_getaffinity(0))))
    return _resident_mib("VmHWM") - before


def _resident_mib(name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        msg = f"/proc/self/status has no {name}; run this benchmark on Linux"
        raise OSError(msg)
    return int(found[1]) / 1024


def _ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--quick", action="store_true", help="the sizes that have figures only, memory left out"
    )
    parser.add_argument("--memory", action="store_true", help="the coordinator's peak memory only")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--memory-here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_here:
        print(json.dumps(measure_memory()))
        return
    figures: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    sizes = () if arguments.memory else (FLOWER, LARGEST) if arguments.quick else (*CASES, LARGEST)
    our_times(
        Case(*FLOWER, 1), np.zeros(FLOWER[1], np.float32), b""
    )  # memory and caches as they are later on
    for num_lenders, size in sizes:
        for dropped in (0, num_lenders // 10):
            case = Case(num_lenders, size, dropped)
            times = measure(case, arguments.turns, with_flower=(num_lenders, size) == FLOWER)
            rows.append(
                {"lenders": num_lenders, "parameters": size, "dropped": dropped}
                | {f"{name}_ms": round(1e3 * statistics.median(times[name]), 2) for name in times}
                | {
                    f"{name}_over_{limit}": round(_ratio(times[name], times[f"{name}_{limit}"]), 2)
                    for name in PARTIES
                    for limit in ("bound", "ctr", "floor")
                }
            )
            if dropped:
                figures |= _figures(case, times)
    if not arguments.quick:
        figures["secagg.server.n100_m1e7.peak_mib"] = peak_memory_mib()
    print_document(document("secure_aggregation", figures, rows), as_json=arguments.json)


def _figures(case: Case, times: dict[str, list[float]]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for party in PARTIES:
        if (case.num_lenders, case.size) == LARGEST:
            figures[f"secagg.{party}.n100_m1e6.over_bound"] = _ratio(times[party], times[f"{party}_bound"])
    if (case.num_lenders, case.size) == FLOWER:
        for name, theirs, ours in (
            ("client.n10_m1e6.flwr_over_ours", "flower_client", "client"),
            ("server.n10_m1e6.flwr_over_ours", "flower_server", "sum"),
            ("server.n10_m1e6.flwr_over_everything", "flower_server", "server"),
        ):
            figures[f"secagg.{name}"] = _ratio(times[theirs], times[ours])
    return figures


if __name__ == "__main__":
    main()
