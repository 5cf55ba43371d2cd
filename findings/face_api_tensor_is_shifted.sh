#!/usr/bin/env bash
# npm @vladmandic/face-api 1.7.15: a picture given as a tensor reaches the networks shifted against
# the same picture given as a canvas. `NetInput.toBatchTensor` resizes a tensor by `resizeBilinear`
# without half-pixel centres, so that pixel i of the 112 shows position i * side / 112. Where height
# and width differ by an odd number, the odd row of padding lies below (or right), while
# `FaceLandmark68Net.postProcess` takes half of it from either side. A canvas has neither shift. One
# would guess that the kind of input does not matter.
#
# Seen: the middle of a round spot, as found in the network's input and put back by `postProcess`,
# lies 1.5 pixels too far right and down in a tensor of 448x448, 3.5 in one of 896x896, 0.29 too far
# left and up in one of 48x48, 1.5 right and 1.0 down in one of 448x447. In a canvas it is within
# 0.05 pixels, and at 112x112 in both. Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
npm install --silent --no-audit --no-fund --prefix "$folder" \
  @vladmandic/face-api@1.7.15 @napi-rs/canvas@1.1.1

cat >"$folder/program.mjs" <<'PROGRAM'
import assert from "node:assert";
import { Canvas, createCanvas, Image, ImageData } from "@napi-rs/canvas";

// The bundle is for browsers: where it sees node, it asks for a module that it does not hold.
Object.defineProperty(process, "versions", { value: { ...process.versions, node: undefined } });
const bundle = new URL("node_modules/@vladmandic/face-api/dist/face-api.esm.js", import.meta.url);
const { tf, env, FaceLandmark68Net, NetInput } = await import(bundle);
tf.setPlatform("node", {
  now: () => performance.now(),
  isTypedArray: (a) => ArrayBuffer.isView(a) && !(a instanceof DataView),
});
env.setEnv({
  Canvas,
  CanvasRenderingContext2D: createCanvas(1, 1).getContext("2d").constructor,
  Image,
  ImageData,
  Video: class {},
  createCanvasElement: () => createCanvas(1, 1),
});
await tf.setBackend("cpu");
await tf.ready();

/** A grey round spot on black, with its middle at pixel (x, y). */
function spot(width, height, x, y) {
  const canvas = createCanvas(width, height);
  const context = canvas.getContext("2d");
  const picture = context.createImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    const square = ((i % width) - x) ** 2 + (Math.floor(i / width) - y) ** 2;
    const value = 255 * Math.exp((-square * 72) / Math.min(width, height) ** 2);
    picture.data.set([value, value, value, 255], 4 * i);
  }
  context.putImageData(picture, 0, 0);
  return canvas;
}

/** The canvas's pixels, [height, width, 3]. */
function tensor(canvas) {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const shape = [canvas.height, canvas.width, 4];
  return tf.tensor3d(Int32Array.from(data), shape, "int32").slice([0, 0, 0], [-1, -1, 3]);
}

/** The pixel of the picture where the spot's middle is, as seen in the network's input. */
function seen(input, { width, height }) {
  const square = new NetInput([input]).toBatchTensor(112).sum([0, 3]);
  const middle = [0, 1].map((axis) => {
    const along = square.sum(axis).mul(tf.range(0, 112));
    return (along.sum().div(square.sum()).dataSync()[0] + 0.5) / 112;
  });
  const points = tf.tensor2d(Array(68).fill(middle).flat(), [1, 136]); // as the network's answer
  const [x, y] = new FaceLandmark68Net().postProcess(points, 112, [{ width, height }]).dataSync();
  return [x * width - 0.5, y * height - 0.5];
}

for (const [width, height, ...shift] of [
  [112, 112, 0, 0],
  [448, 448, 1.5, 1.5],
  [896, 896, 3.5, 3.5],
  [48, 48, -0.286, -0.286],
  [448, 447, 1.5, 1],
]) {
  const at = [0.45 * width, 0.55 * height];
  const canvas = spot(width, height, ...at);
  for (const [kind, input, wanted] of [
    ["canvas", canvas, [0, 0]],
    ["tensor", tensor(canvas), shift],
  ]) {
    const off = seen(input, canvas).map((value, axis) => value - at[axis]);
    const [right, down] = off.map((value) => value.toFixed(2));
    console.log(`${width}x${height} as a ${kind}: ${right} pixels right, ${down} down`);
    const near = off.every((value, axis) => Math.abs(value - wanted[axis]) < 0.05);
    assert(near, `changed: wanted ${wanted}`);
  }
}
PROGRAM
node "$folder/program.mjs"
