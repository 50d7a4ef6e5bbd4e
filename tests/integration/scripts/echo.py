"""An instance that sends back what it is sent, until it is told to end."""

import blendtorch.btb as btb

args, _ = btb.parse_blendtorch_args()
with btb.DuplexChannel(args.btsockets["CTRL"], args.btid) as channel:
    while not (message := channel.recv()).get("end"):
        channel.send(i=message["i"], image=message["image"][::-1].copy(), meta=message["meta"])
    channel.send(ended=True)
