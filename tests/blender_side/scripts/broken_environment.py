"""An environment whose first step fails; the agent is here."""

import blendtorch.btb as btb


class Broken(btb.env.BaseEnv):
    def _env_reset(self):
        pass

    def _env_prepare_step(self, action):
        raise RuntimeError("boom")

    def _env_post_step(self):
        return {"obs": 0}


Broken(lambda env, **ctx: (env.CMD_STEP, 1)).run(frame_range=(1, 10))
