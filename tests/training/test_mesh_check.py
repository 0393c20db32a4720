"""Impossible requests are refused before anything is loaded or compiled, with the nearest that works."""

import jax
import pytest

from configs import stage1_proxy, stage2_convnext_tiny, stage2_vits, stage2_vitt
from eupe_jax.sharding.mesh import make_mesh
from eupe_jax.training.mesh_check import check_mesh


def refused(config, message, processes=1, **axes):
    with pytest.raises(ValueError, match=message):
        check_mesh(config, make_mesh(**axes, devices=jax.devices()[:8]), processes)


def test_published_recipes_fit():
    mesh = make_mesh(4, devices=jax.devices()[:8])
    for recipe in (stage1_proxy, stage2_vitt, stage2_convnext_tiny):
        check_mesh(recipe.get_config(), mesh, 8)
    check_mesh(stage2_vits.get_config(), make_mesh(2, 2, devices=jax.devices()[:8]), 4)


def test_a_batch_that_does_not_divide():
    config = stage2_vitt.get_config()
    config.batch_size = 100
    refused(config, r"batch_size=100 .* the 8 devices .*\(data 2 x fsdp 4\): .*batch_size to 96 or 104$", fsdp=4)
    config.batch_size, config.accumulate = 5, 3
    refused(config, r"batch_size=5 .* --config\.batch_size to 24$")


def test_micro_batches_that_do_not_divide():
    config = stage2_vitt.get_config()
    config.batch_size, config.accumulate = 48, 4
    message = (
        r"accumulate=4 does not divide the 6 images of each device .*accumulate to 3 or 6, .*batch_size to 32 or 64"
    )
    refused(config, message)


def test_more_hosts_than_parts_of_the_batch():
    config = stage2_convnext_tiny.get_config()
    config.teachers.proxy.overrides = {"num_heads": 8, "embed_dim": 1536}
    refused(config, r"8 hosts, .* only 4 \(data 4 x fsdp 1\).* mesh\.tensor=2 to --config\.mesh\.tensor=1", 8, tensor=2)
    refused(config, r"4 hosts, .* only 1 \(data 1 x fsdp 1\).* mesh\.tensor=8 to --config\.mesh\.tensor=2", 4, tensor=8)


def test_heads_that_a_tensor_group_cannot_share():
    refused(stage2_vitt.get_config(), r"mesh\.tensor=2 .* heads of students\.vitt \(3\): .*tensor=1$", tensor=2)
    # the proxy's 16 heads would do, the student's 6 do not
    refused(stage2_vits.get_config(), r"mesh\.tensor=8 .* students\.vits \(6\): .*tensor=2$", tensor=8)
    refused(stage1_proxy.get_config(), r"mesh\.tensor=8 .* teachers\.dinov3 \(20\): .*tensor=4$", tensor=8)


def test_grouped_convolutions_do_not_train_in_tensor_groups():
    config = stage2_convnext_tiny.get_config()
    message = r"mesh\.tensor=2 makes the gradients of students\.convnext_tiny wrong: .* --config\.mesh\.tensor=1, or "
    refused(config, message, tensor=2)
    config.students.convnext_tiny.overrides = {"depthwise": "matmul"}
    check_mesh(config, make_mesh(tensor=2, devices=jax.devices()[:8]), 1)
