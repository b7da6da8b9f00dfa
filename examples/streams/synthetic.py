"""Markov-chain text: entropy and overlap are numbers one sets, not estimates.

Each domain is a first-order Markov chain over K symbols. Every row of every transition
matrix is a permutation of one distribution q, so that

  entropy rate           h = -sum_k q_k log q_k           for every domain, any overlap
  best accuracy          max_k q_k                        of predicting the next symbol
  loss of a's model on b CE(a, b) = -sum_i pi^b_i sum_j P^b_ij log P^a_ij

with pi the stationary distribution. `entropy` sets q (q_k proportional to
exp(-beta k), beta found by bisection); `overlap` sets the share of rows that all
domains have in common, the rest being permuted anew for each domain. So the two knobs
are independent: 1 makes one task of all domains, 0 shares no row.
"""

import numpy as np

from examples.streams.stream import Part, Stream


def row_distribution(symbols: int, entropy: float) -> np.ndarray:
    """Geometric distribution over the symbols with this entropy: float64 (symbols,)."""
    if not 0 < entropy <= np.log(symbols):
        raise ValueError(
            f"entropy: got {entropy}, expected nats above 0 and at most log(symbols) = "
            f"{np.log(symbols):.4f}."
        )

    def at(beta):
        q = np.exp(-beta * np.arange(symbols))
        return q / q.sum()

    low, high = 0.0, 1.0
    while entropy_of(at(high)) > entropy:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if entropy_of(at(middle)) > entropy else (low, middle)
        )
    q = at(high)
    if not q.min() > 0:
        raise ValueError(
            f"entropy: got {entropy}, too little for {symbols} symbols: the rarest has "
            "a probability below the smallest float64. Expected more entropy or fewer "
            "symbols."
        )
    return q


def entropy_of(q: np.ndarray) -> float:
    """Shannon entropy in nats."""
    q = q[q > 0]
    return float(-(q * np.log(q)).sum())


def transitions(
    tasks: int, symbols: int, entropy: float, overlap: float, seed: int
) -> np.ndarray:
    """Transition matrices float64 (tasks, symbols, symbols), rows sum to 1.

    Args:
      tasks: number of domains.
      symbols: number of symbols K.
      entropy: nats a symbol, in (0, log K].
      overlap: in [0, 1]; the first round(overlap K) rows of a random order are shared.
        The order does not depend on `overlap`: a larger overlap adds rows to it.
      seed: of all permutations.
    """
    if not 0 <= overlap <= 1:
        raise ValueError(f"overlap: got {overlap}, expected a share from 0 to 1.")
    q = row_distribution(symbols, entropy)
    rng = np.random.default_rng([seed, 0])
    common = np.stack([rng.permutation(q) for _ in range(symbols)])
    own = np.stack([[rng.permutation(q) for _ in range(symbols)] for _ in range(tasks)])
    shared = rng.permutation(symbols)[: round(overlap * symbols)]
    own[:, shared] = common[shared]
    return own


def stationary(matrix: np.ndarray) -> np.ndarray:
    """pi with pi P = pi: float64 (symbols,). All entries of P must be positive."""
    size = len(matrix)
    system = np.vstack([matrix.T - np.eye(size), np.ones(size)])
    return np.linalg.lstsq(system, np.append(np.zeros(size), 1.0))[0]


def cross_entropy(matrices: np.ndarray) -> np.ndarray:
    """CE[a, b], nats a symbol of domain b under domain a's chain; the diagonal is h."""
    visited = np.stack([stationary(p) for p in matrices])
    pairs = visited[:, :, None] * matrices
    return -np.einsum("bij,aij->ab", pairs, np.log(matrices))


def sample(
    matrix: np.ndarray, windows: int, length: int, rng: np.random.Generator
) -> np.ndarray:
    """Independent stationary sequences: int32 (windows, length)."""
    edges = np.cumsum(matrix, 1)
    edges[:, -1] = 1.0  # else a sum of 1 - 1e-16 could be exceeded
    out = np.empty((windows, length), np.int32)
    start = np.cumsum(stationary(matrix))
    start[-1] = 1.0
    out[:, 0] = np.searchsorted(start, rng.random(windows), side="right")
    for place in range(1, length):
        thrown = rng.random(windows)
        out[:, place] = (thrown[:, None] >= edges[out[:, place - 1]]).sum(1)
    return out


def markov_text(
    *,
    name: str = "markov-text",
    tasks: int = 8,
    seed: int = 0,
    overlap: float = 0.5,
    entropy: float = 1.5,
    symbols: int = 32,
    context: int = 64,
    windows: int = 2000,
) -> Stream:
    """A stream of Markov chains: domain-incremental next-symbol prediction.

    Args:
      name: of the stream.
      tasks: number of domains.
      seed: of matrices and samples.
      overlap: share of the symbols after which all domains continue alike, in [0, 1].
      entropy: nats a symbol, in (0, log(symbols)].
      symbols: size of the alphabet.
      context: predictions a window.
      windows: training windows a domain; a fifth as many for validation and for test.

    Returns:
      The stream; x (tasks, windows, context) and y the symbols one place later. In
      `facts`: entropy (the loss of a perfect model), cross_entropy (tasks, tasks), the
      excess over it being what the wrong domain's model loses, overlap as rounded to
      whole rows, best_accuracy, transitions, stationary.
    """
    for argument, value, least in (
        ("tasks", tasks, 1),
        ("symbols", symbols, 2),
        ("context", context, 1),
        ("windows", windows, 5),
    ):
        if value < least:
            raise ValueError(f"{argument}: got {value}, expected at least {least}.")
    matrices = transitions(tasks, symbols, entropy, overlap, seed)
    parts = []
    for index, count in enumerate((windows, windows // 5, windows // 5)):
        drawn = np.stack(
            [
                sample(
                    p, count, context + 1, np.random.default_rng([seed, 1, index, t])
                )
                for t, p in enumerate(matrices)
            ]
        )
        weight = np.ones((tasks, count), np.float32)
        parts.append(Part(drawn[..., :-1], drawn[..., 1:], weight))
    q = row_distribution(symbols, entropy)
    shared = round(overlap * symbols)
    return Stream(
        name=name,
        scenario="domain",
        about=f"{tasks} Markov chains over {symbols} symbols, {entropy_of(q):.4f} nats "
        f"a symbol, {shared} of {symbols} rows in common",
        task_names=tuple(f"chain {t}" for t in range(tasks)),
        train=parts[0],
        valid=parts[1],
        test=parts[2],
        classes=np.tile(np.arange(symbols, dtype=np.int32), (tasks, 1)),
        class_mask=np.ones((tasks, symbols), bool),
        facts={
            "overlap": shared / symbols,
            "entropy": entropy_of(q),
            "best_accuracy": float(q.max()),
            "cross_entropy": cross_entropy(matrices),
            "transitions": matrices,
            "stationary": np.stack([stationary(p) for p in matrices]),
        },
    )
