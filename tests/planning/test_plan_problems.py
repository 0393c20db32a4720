"""Figures that cannot be trusted are named: each check sees what it is there for."""

import jax

from configs import stage2_vitb
from eupe_jax.planning import pairs, plan, traced
from eupe_jax.planning.compiling import Compiled, Request
from eupe_jax.sharding.mesh import make_mesh
from eupe_jax.training import program
from eupe_jax.training.model_flops import step_flops
from tests.planning.programs import costs


def test_passes_that_the_architecture_counts_otherwise_are_problems(tmp_path):
    """Of a step without the gradient of one of twelve blocks, trace and program agree: the architecture does not."""
    config = stage2_vitb.get_config()
    (chosen,) = pairs.every_pair(config)
    work, images = step_flops(config, chosen), config.batch_size / 256
    executed = {
        traced.TEACHERS: sum(work.teachers.values()) * images, traced.STUDENTS: sum(work.students.values()) * images,
        traced.ADAPTERS: sum(work.adapters.values()) * images, traced.BACKWARD: 1.994 * work.trained * images,
    }  # fmt: skip

    def problems(**changed):
        given = executed | {getattr(traced, k): executed[getattr(traced, k)] * v for k, v in changed.items()}
        compiled = Compiled("", 0.0, 0.0, 0, {}, given, None, None)
        return plan._miscounts(Request(config, "v5e:16x16", 1, chosen, tmp_path), compiled, work, 256)

    assert problems() == []
    for term, factor in (("TEACHERS", 1.01), ("STUDENTS", 0.99), ("ADAPTERS", 0.5), ("BACKWARD", 11.5 / 12)):
        (problem,) = problems(**{term: factor})
        assert problem.startswith(getattr(traced, term)) and "by the architecture" in problem


def test_xlas_other_count_of_a_block_is_a_problem_of_wide_models_below_of_any():
    wide, narrow = stage2_vitb.get_config(), stage2_vitb.get_config("runlocal")
    assert plan._xla_problems(wide, {"students.vitb": 1.01, "teachers.proxy": 1.002}) == []
    (problem,) = plan._xla_problems(wide, {"students.vitb": 1.2})
    assert "1.200 x our FLOPs of a block of students.vitb" in problem
    assert plan._xla_problems(narrow, {"students.vitb": 1.2}) == []
    assert len(plan._xla_problems(narrow, {"students.vitb": 0.9})) == 1


def test_a_program_of_other_flops_or_with_whole_gradients_is_a_problem():
    """The second fixture sums whole gradients of weights that are cut over eight devices."""
    found, weights = costs("fsdp_gradient_v5e"), [(6, 1024, 1024)]
    assert plan._program_problems("a", found, found.flops * 1.005, weights) == []
    (problem,) = plan._program_problems("a", found, found.flops * 1.05, weights)
    assert "(-4.8%): its time cannot be trusted" in problem
    found = costs("fsdp_gradient_whole_v5e")
    (problem,) = plan._program_problems("a", found, found.flops, weights)
    assert problem.startswith("an all-reduce of a whole weight: all-reduce") and "1024x1024 over 8 devices" in problem
    assert plan._program_problems("a", found, found.flops, []) == []


def test_weights_that_are_cut_are_told_from_those_that_every_device_holds():
    config = stage2_vitb.get_config()
    config.mesh.fsdp = 4
    run = program.abstract_run(config, make_mesh(4, devices=jax.devices()[:4]))
    cut = plan._cut_shapes(run.arguments)
    weights = jax.tree.leaves(run.arguments[0]["students"])
    whole = {x.shape for x in weights if x.sharding.is_fully_replicated}
    assert (12, 768, 2304) in cut and () in whole and not whole & set(cut)
    assert plan._cut_shapes(program.abstract_run(config, make_mesh(devices=jax.devices()[:1])).arguments) == []
