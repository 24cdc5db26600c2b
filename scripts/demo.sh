#!/usr/bin/env bash
# From synthetic videos to a trained and evaluated model. What an earlier run finished is kept.
set -euo pipefail
out=$1
began=$SECONDS

step() { printf '\n== %s\n' "$1"; }

step "1/5  synthetic videos: sound and picture with shared causes"
avid-preprocess demo "$out/videos" --instances 300 --seed 0
step "2/5  videos to shards"
avid-preprocess kinetics "$out/videos/train" "$out/shards/train" --split train --samples-per-shard 25
avid-preprocess kinetics "$out/videos/val" "$out/shards/val" --split val --samples-per-shard 25
avid-shards preview "$out/shards/train" --out "$out/contact-sheet.png"
step "3/5  training AVID on the CPU (progress in $out/run/train.log)"
avid-train configs/demo.yaml --data "$out/shards/train" --output "$out/run" --resume
step "4/5  retrieval on held-out videos"
avid-evaluate retrieval "$out/run" --data "$out/shards/val"
step "5/5  done in $((SECONDS - began)) s"
cat <<END
videos          $out/videos/{train,val}/<class>/*.mp4
shards          $out/shards/{train,val}        (look: avid-shards info $out/shards/train)
run             $out/run                       (curves: tensorboard --logdir $out/run)
retrieval       $out/run/retrieval.json
contact sheet   $out/contact-sheet.png
loss curve      $out/run/loss.png
END
