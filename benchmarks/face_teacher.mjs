// What face-api itself says of pictures: node face_teacher.mjs FOLDER, called by face_teacher.py.
// FOLDER has face-api.mjs (the package's bundle, TensorFlow.js inside), the models' files, and
// pictures.json; answers are printed as JSON.
import fs from "node:fs";
import path from "node:path";
import url from "node:url";

const folder = path.resolve(process.argv[2]);
// The bundle is built for browsers: in node it would ask for a module that it left out.
Object.defineProperty(process, "versions", { value: { ...process.versions, node: undefined } });
const { tf, env, FaceLandmark68Net, AgeGenderNet } = await import(
  url.pathToFileURL(path.join(folder, "face-api.mjs")).href
);
tf.setPlatform("node", {
  now: () => performance.now(),
  isTypedArray: (a) => ArrayBuffer.isView(a) && !(a instanceof DataView),
});
env.setEnv({ Canvas: class {}, Image: class {}, Video: class {} }); // pictures come as tensors
await tf.setBackend("cpu");
await tf.ready();

function load(net, name) {
  const manifest = JSON.parse(
    fs.readFileSync(path.join(folder, `${name}_model-weights_manifest.json`)),
  );
  const bytes = fs.readFileSync(path.join(folder, `${name}_model.bin`));
  const buffer = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
  net.loadFromWeightMap(tf.io.decodeWeights(buffer, manifest.flatMap((group) => group.weights)));
  return net;
}

const points = load(new FaceLandmark68Net(), "face_landmark_68");
const person = load(new AgeGenderNet(), "age_gender");
const answers = [];
for (const { shape, pixels } of JSON.parse(fs.readFileSync(path.join(folder, "pictures.json")))) {
  const picture = tf.tensor3d(new Uint8Array(Buffer.from(pixels, "base64")), shape, "int32");
  const landmarks = await points.forward(picture);
  const { age, gender } = await person.forward(picture);
  answers.push({
    landmarks: Array.from(landmarks.dataSync()),
    age: age.dataSync()[0],
    male: gender.dataSync()[0],
  });
}
console.log(JSON.stringify({ tfjs: tf.version_core, answers }));
