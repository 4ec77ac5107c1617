{{/* The data-set run's pods: the one of the Job, or head and workers of the RayJob. */}}

{{- define "panotriton.jobLabels" -}}
{{ include "panotriton.labels" . }}
{{- with .Values.job.labels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "panotriton.jobServer" -}}
{{ .Values.job.server | default (printf "%s-headless.%s.svc" (include "panotriton.fullname" .) .Release.Namespace) }}
{{- end }}

{{/* Of `panotriton`, as a list in YAML. */}}
{{- define "panotriton.jobArguments" -}}
{{- with .Values.job }}
- dataset
- {{ .input | quote }}
- --output={{ .output }}
- --url=dns:///{{ include "panotriton.jobServer" $ }}:8001
{{- if .sampleN }}
- --sample-n={{ int64 .sampleN }}
{{- else }}
- --target-n={{ int64 .targetN }}
{{- end }}
- --seed={{ int64 .seed }}
- --format={{ .format }}
- --in-flight={{ .perReplica }}
- --max-failed={{ int64 .maxFailed }}
- --patience-s={{ .patienceSeconds }}
- --progress=json
- --metrics-port=8004
{{- if eq .engine "ray" }}
- --engine=ray
- --address=auto
{{- end }}
{{- range .options }}
- {{ . | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* root; name: of the container; resources; run: whether its command is the run. Ray's pods get theirs, with probes
     that this image could not answer, from the operator unless they have some. */}}
{{- define "panotriton.jobPod" -}}
{{- $job := .root.Values.job -}}
metadata:
  labels:
    {{- include "panotriton.podLabels" .root | nindent 4 }}
    app.kubernetes.io/component: dataset
spec:
  {{- if .run }}
  restartPolicy: Never
  {{- end }}
  serviceAccountName: {{ include "panotriton.serviceAccount" .root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  securityContext: {{- include "panotriton.podSecurity" .root | nindent 4 }}
  {{- with .root.Values.image.pullSecrets }}
  imagePullSecrets:
  {{- range . }}
    - name: {{ . }}
  {{- end }}
  {{- end }}
  {{- with $job.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $job.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $job.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $job.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  containers:
    - name: {{ .name }}
      image: {{ $job.image }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      {{- if .run }}
      args: {{- include "panotriton.jobArguments" .root | fromYamlArray | toYaml | nindent 8 }}
      {{- end }}
      {{- if ne .name "ray-worker" }}
      ports:
        - {name: run-metrics, containerPort: 8004}
        {{- if not .run }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        {{- end }}
      {{- end }}
      {{- if not .run }}
      livenessProbe: {{- include "panotriton.rayProbe" . | nindent 8 }}
      readinessProbe: {{- include "panotriton.rayProbe" . | nindent 8 }}
      {{- end }}
      {{- with $job.secret }}
      envFrom:
        - secretRef: {name: {{ . }}}
      {{- end }}
      securityContext: {{- include "panotriton.containerSecurity" .root | nindent 8 }}
      resources: {{- toYaml .resources | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        {{- if $job.inputClaim }}
        - {name: input, mountPath: /input, readOnly: true}
        {{- end }}
        {{- if $job.outputClaim }}
        - {name: output, mountPath: /output}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: 8Gi}
    {{- with $job.inputClaim }}
    - name: input
      persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
    {{- end }}
    {{- with $job.outputClaim }}
    - name: output
      persistentVolumeClaim: {claimName: {{ . }}}
    {{- end }}
{{- end }}

{{- define "panotriton.rayProbe" -}}
exec: {command: [bash, -c, 'exec 3<>/dev/tcp/127.0.0.1/{{ ternary "6379" "52365" (eq .name "ray-head") }}']}
initialDelaySeconds: 10
periodSeconds: 10
timeoutSeconds: 5
failureThreshold: 12
{{- end }}
