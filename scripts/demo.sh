#!/usr/bin/env bash
# From synthetic videos to trained and evaluated models. What an earlier run finished is kept.
set -euo pipefail
out=$1
began=$SECONDS

step() { printf '\n== %s\n' "$1"; }

evaluate() {
    avid-evaluate retrieval "$out/$1" --data "$out/shards/val" --output "$out/evaluation/$1-retrieval"
    avid-evaluate knn "$out/$1" --data "$out/shards/val" --gallery "$out/shards/train" --output "$out/evaluation/$1-knn"
}

step "1/7  synthetic videos: sound and picture with shared causes"
avid-preprocess demo "$out/videos" --instances 300 --seed 0
step "2/7  videos to shards"
avid-preprocess kinetics "$out/videos/train" "$out/shards/train" --split train --samples-per-shard 25
avid-preprocess kinetics "$out/videos/val" "$out/shards/val" --split val --samples-per-shard 25
avid-shards preview "$out/shards/train" --out "$out/contact-sheet.png"
step "3/7  training AVID on the CPU (progress in $out/avid/train.log)"
avid-train configs/demo.yaml --data "$out/shards/train" --output "$out/avid" --resume
step "4/7  training AVID+CMA from it (progress in $out/cma/train.log)"
avid-train configs/demo-cma.yaml --data "$out/shards/train" --output "$out/cma" --start-from "$out/avid" --resume
step "5/7  evaluation on held-out videos: AVID"
evaluate avid
step "6/7  evaluation on held-out videos: AVID+CMA"
evaluate cma
step "7/7  done in $((SECONDS - began)) s"
cat <<END
videos          $out/videos/{train,val}/<class>/*.mp4
shards          $out/shards/{train,val}        (look: avid-shards info $out/shards/train)
runs            $out/avid, $out/cma            (curves: tensorboard --logdir $out)
evaluations     $out/evaluation/{avid,cma}-{retrieval,knn}/results.json, and report.html to open in a browser
contact sheet   $out/contact-sheet.png
loss curves     $out/avid/loss.png, $out/cma/loss.png
END
