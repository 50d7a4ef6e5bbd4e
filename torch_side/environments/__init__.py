"""Environments in Blender, as a trainer sees them. What users import is in ``torch_side.env``.

=============  =====================================================================================
spaces.py      gymnasium's spaces of what a script declares, and back
description.py what environments say of themselves, and the spaces that follow
requests.py    what is asked of the environments of some instances, and what they answer
launch.py      instances for environments; arguments of their scripts
old.py         blendtorch's interface: ``RemoteEnv``, ``launch_env``, ``OpenAIRemoteEnv``
single.py      one environment: ``BlenderEnv``
vector.py      many, stepped at once or each at its own pace: ``BlenderVectorEnv``
pace.py        what its ``stats()`` count
pictures.py    ``render``: the last picture, or a window that shows it
=============  =====================================================================================
"""
