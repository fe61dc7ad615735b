"""In processes of their own: in that of the tests, another one may have imported the compiler."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python(program):
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_optimizers_take_the_same_steps_without_the_compiler():
    lines = python(
        "import sys, torch\n"
        "from contextlib import nullcontext\n"
        "from raydml.training.parts import OPTIMIZERS\n"
        "from raydml.training.uncompiled import without_compiler\n"
        "def trained(name, context):\n"
        "    torch.manual_seed(0)\n"
        "    layer, inputs = torch.nn.Linear(5, 3), torch.randn(7, 5)\n"
        "    with context():\n"
        "        optimizer = OPTIMIZERS[name](layer.parameters(), lr=0.1)\n"
        "    for step in range(4):\n"
        "        layer(inputs).square().sum().backward()\n"
        "        with context():\n"
        "            optimizer.step()\n"
        "            optimizer.zero_grad()\n"
        "            optimizer.load_state_dict(optimizer.state_dict())\n"
        "    return layer.weight.detach()\n"
        "first = {name: trained(name, without_compiler) for name in OPTIMIZERS}\n"
        "print('torch._dynamo' in sys.modules)\n"
        "second = {name: trained(name, nullcontext) for name in OPTIMIZERS}\n"
        "print('torch._dynamo' in sys.modules, len(first))\n"
        "print(all(torch.equal(first[name], second[name]) for name in OPTIMIZERS))\n"
    )
    assert lines == ["False", "True 4", "True"]


def test_a_trial_does_not_load_the_compiler_which_works_afterwards():
    """Two epochs, the state between them saved and loaded. 2 s and 170 MB in each process that trains."""
    lines = python(
        "import sys, torch\n"
        "from tests.training.test_trainer import trainer_of\n"
        "trainer, again = trainer_of(), trainer_of()\n"
        "next(trainer.epochs())\n"
        "again.load_state_dict(trainer.state_dict())\n"
        "print(next(again.epochs())['epoch'])\n"
        "print([name for name in ('torch._dynamo', 'torch._inductor', 'sympy') if name in sys.modules])\n"
        "double = torch.compile(lambda x: 2 * x, backend='eager')\n"
        "print(double(torch.ones(1)).item(), torch._dynamo is sys.modules['torch._dynamo'], torch._dynamo.__file__)\n"
    )
    assert lines[:2] == ["2", "[]"]
    assert lines[2].startswith("2.0 True /"), "the compiler itself, and nothing that stands in for it"


def test_a_compiler_that_was_loaded_stays_in_its_place():
    lines = python(
        "import sys, torch, torch._dynamo as real\n"
        "from raydml.training.uncompiled import without_compiler\n"
        "with without_compiler():\n"
        "    print(sys.modules['torch._dynamo'] is real, torch._dynamo is real)\n"
        "print(sys.modules['torch._dynamo'] is real, torch._dynamo is real)\n"
    )
    assert lines == ["True True", "True True"]
