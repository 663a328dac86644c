"""Pods of engines: what they ask for, and what they may not do."""

import json

import pytest

from packetstack_core.kinds import TableEngine
from packetstack_core.reading import parse
from packetstack_operator import observing, pods

RAW = {
    "apiVersion": "packetstack.io/v1alpha1",
    "kind": "PacketStack",
    "metadata": {"name": "edge", "namespace": "shop", "uid": "u"},
    "spec": {
        "listeners": [{"name": "web", "address": "192.0.2.10", "port": 80, "backends": {"endpoints": []}}],
        "snat": {"addresses": ["192.0.2.64"]},
    },
}


def made(node=None, **engine):
    raw = {**RAW, "spec": {**RAW["spec"], "engine": engine}}
    stack = parse(raw)
    entry = {
        "id": 7,
        "name": "edge-7",
        "state": "Pending",
        "template": pods.template(stack.spec.engine, "image:1"),
        "queues": stack.spec.engine.queues,
        "cores": stack.spec.engine.cores,
        "cpuPolicy": stack.spec.engine.cpu_policy,
    }
    return pods.pod(raw, stack, stack.spec.engine, TableEngine.model_validate(entry), "image:1", node)


def container(pod):
    (only,) = pod["spec"]["containers"]
    return only


def test_an_engine_with_exclusive_cores_is_guaranteed_whole_ones():
    resources = container(made(cores=2, cpuPolicy="Exclusive", memory="1Gi"))["resources"]
    assert resources["requests"] == resources["limits"] == {"cpu": "2", "memory": "1Gi"}


def test_an_engine_that_shares_its_cores_has_no_limit_of_cpu():
    resources = container(made())["resources"]
    assert resources["limits"] == {"memory": "512Mi"}
    assert set(resources["requests"]) == {"cpu", "memory"}


def test_huge_pages_are_requested_and_mounted():
    pod = made(hugePages={"pageSize": "2Mi", "size": "64Mi"})
    assert container(pod)["resources"]["limits"]["hugepages-2Mi"] == "64Mi"
    assert {"name": "hugepages", "emptyDir": {"medium": "HugePages-2Mi"}} in pod["spec"]["volumes"]


def test_an_engine_may_do_little_and_has_no_token():
    pod = made()
    security = container(pod)["securityContext"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security["runAsNonRoot"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["readOnlyRootFilesystem"] is True
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert "hostNetwork" not in pod["spec"]


@pytest.mark.parametrize(
    ("interface", "limit"),
    [
        ({"attachment": {"networkAttachmentDefinition": "net"}}, None),
        ({"devicePlugin": {"resourceName": "intel.com/vf", "networkAttachmentDefinition": "net"}}, "intel.com/vf"),
    ],
)
def test_an_attachment_is_asked_for_by_annotation(interface, limit):
    pod = made(interface=interface)
    asked = json.loads(pod["metadata"]["annotations"]["k8s.v1.cni.cncf.io/networks"])
    assert asked == [{"name": "net", "namespace": "shop", "interface": "net1"}]
    assert container(pod)["resources"]["limits"].get(limit) == ("1" if limit else None)


def test_a_resource_claim_is_a_claim_of_the_pod_and_of_its_container():
    pod = made(interface={"resourceClaim": {"resourceClaimTemplateName": "vf"}})
    assert pod["spec"]["resourceClaims"] == [{"name": "interface", "resourceClaimTemplateName": "vf"}]
    assert container(pod)["resources"]["claims"] == [{"name": "interface"}]


def test_the_stacks_node_is_in_each_alternative_of_the_users_affinity():
    terms = [{"matchExpressions": [{"key": "a", "operator": "Exists"}]}, {"matchExpressions": []}]
    custom = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}
    pod = made(node="n1", podTemplate={"affinity": custom})
    made_terms = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    for term, own in zip(made_terms["nodeSelectorTerms"], terms, strict=True):
        assert term == {**own, "matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]}


def test_labels_of_the_user_do_not_replace_the_operators():
    labels = {"team": "a", "packetstack.io/engine": "1"}
    pod = made(podTemplate={"metadata": {"labels": labels}})
    assert pod["metadata"]["labels"]["team"] == "a"
    assert pod["metadata"]["labels"]["packetstack.io/engine"] == "7"


def test_an_entry_of_the_flow_table_can_be_read_back_from_its_pod():
    entry = observing.from_pod(made(cores=2, cpuPolicy="Exclusive"))
    assert (entry.id, entry.name, entry.queues, entry.cores, entry.cpu_policy) == (7, "edge-7", 8, 2, "Exclusive")


def test_another_image_is_another_template():
    engine = parse(RAW).spec.engine
    assert pods.template(engine, "a") != pods.template(engine, "b")
    assert pods.template(engine.model_copy(update={"image": "c"}), "a") == pods.template(
        engine.model_copy(update={"image": "c"}), "b"
    )
